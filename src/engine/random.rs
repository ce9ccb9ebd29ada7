//! Random numbers that need not be unpredictable.

/// A source of random numbers (xorshift64, Marsaglia 2003).
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// Returns a number from 0 to 1, excluding 1.
    pub(crate) fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Returns a factor from 0.5 to 1.
    pub(crate) fn jitter(&mut self) -> f64 {
        0.5 + 0.5 * self.unit()
    }
}
