//! A registry by script.
