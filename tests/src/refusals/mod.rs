//! Requests that a shim refuses, and its answers. A container of the same shim, the witness, is not affected.
//!
//! Each function asks for what cannot be, looks at what is so of every shim (an error is answered, nothing is made, what is good goes on
//! working), and returns what was said: how clear that has to be is for the caller to say.

pub mod frames;
pub mod requests;

use anyhow::{Context as _, Result};

use crate::ttrpc::{Answer, Code, refusal};

/// The answer to one request.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// What was wrong.
    pub what: &'static str,
    /// The code.
    pub code: Code,
    /// The sentence.
    pub message: String,
}

impl Refusal {
    /// Reads it from an answer.
    ///
    /// Errors: it was no refusal.
    pub fn of<T: std::fmt::Debug>(what: &'static str, answer: Answer<T>) -> Result<Self> {
        let (code, message) = refusal(answer).context(what)?;
        Ok(Self { what, code, message })
    }
}
