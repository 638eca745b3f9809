//! The only unsafe code of `xctl`.

pub(crate) mod ready;
