#![no_main]

//! Archives: whatever the bytes are, reading them ends, and a name or a size that is accepted is within its limit. x-manager is no library: its
//! module of the format stands alone, and is compiled in.

#[allow(dead_code, unreachable_pub)]
#[path = "../../manager/src/layers/tar/mod.rs"]
mod tar;

use tar::{Kind, Limits, Reader};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let limits = Limits { entries: 1000, file_bytes: 1 << 40 };
    let mut reader = Reader::new(bytes, limits);
    let mut count = 0;
    while let Ok(Some(entry)) = reader.next() {
        count += 1;
        assert!(!entry.path.is_empty() && count <= limits.entries);
        let (mut end, mut read) = (0, 0);
        while let Ok(Some((offset, data))) = reader.data() {
            assert!(offset >= end && !data.is_empty());
            end = offset + data.len() as u64;
            read += data.len();
        }
        if let Kind::File { size } = entry.kind {
            assert!(end <= size && size <= limits.file_bytes && read <= bytes.len());
        }
    }
});
