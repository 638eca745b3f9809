//! Numbers that look random and are the same for the same seed.

/// A sequence of them.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next one, below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }

    /// That many bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let seed = self.below(1 << 31);
        (0..count.div_ceil(8) as u64)
            .flat_map(|number| (number.wrapping_add(seed << 20)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).to_be_bytes())
            .take(count)
            .collect()
    }
}
