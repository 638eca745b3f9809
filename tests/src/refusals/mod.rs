//! Requests that a shim refuses, and its answers. A container of the same shim, the witness, is not affected.
//!
//! Each function sends invalid requests, checks what every shim must do (answer an error, create nothing, keep serving valid requests), and
//! returns the error messages: callers decide how precise those must be.

pub mod frames;
pub mod requests;

use anyhow::{Context as _, Result};

use crate::ttrpc::{Answer, Code, refusal};

/// The answer to one request.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// The invalid part of the request.
    pub what: &'static str,
    /// The code.
    pub code: Code,
    /// The message.
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
