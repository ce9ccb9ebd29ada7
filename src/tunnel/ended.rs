//! The end of a connection.

use std::io;

use super::Refusal;

/// The outcome of a connection.
#[derive(Debug)]
pub(super) enum Ended {
    Closed,
    Failed(io::Error),
    Refused(Refusal),
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Refusal> for Ended {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}
