//! Maps of sparse files: which parts of a file its data are.

/// The parts that have data, as offset and length, in the order of the data.
pub(super) type Parts = Vec<(u64, u64)>;

/// Where the data of a file belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Map {
    parts: Parts,
    next: usize,
    /// What is taken of the next part.
    taken: u64,
}

impl Map {
    /// The map of a file without holes.
    pub(super) fn whole(length: u64) -> Self {
        Self { parts: vec![(0, length)], next: 0, taken: 0 }
    }

    /// Errors: the parts overlap, are not in order, lie outside the file, or are not as long as its data.
    pub(super) fn new(parts: Parts, length: u64, data: u64) -> Result<Self, String> {
        let (mut end, mut all) = (0_u64, 0_u64);
        for (offset, count) in &parts {
            let next = offset.checked_add(*count).filter(|next| *offset >= end && *next <= length);
            end = next.ok_or("its sparse map has parts that overlap, are not in order, or lie outside the file")?;
            all += count;
        }
        if all != data {
            return Err(format!("its sparse map has {all} bytes of data, and the archive {data}"));
        }
        Ok(Self { parts, next: 0, taken: 0 })
    }

    /// The place of the next bytes, and how many of `most` belong there.
    pub(super) fn take(&mut self, most: usize) -> (u64, usize) {
        while let Some((offset, length)) = self.parts.get(self.next) {
            let left = length - self.taken;
            if left == 0 {
                (self.next, self.taken) = (self.next + 1, 0);
                continue;
            }
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(most);
            let at = offset + self.taken;
            self.taken += count as u64;
            return (at, count);
        }
        (0, 0)
    }
}
