//! Fuzz targets: parsers of bytes from clients, archives and registries, with a property that holds for any bytes: no panic, an end, and the
//! bounds that each function documents.
//!
//! The targets in `fuzz/` drive these by coverage; the tests replay `fuzz/corpus` and mutations of it, the same in every run.

pub use crate::api::fuzz::{stream, write};
pub use crate::images::fuzz::image;
pub use crate::images::registry::fuzz::{hosts, registry};
use crate::layers::tar::{Kind, Limits, Reader};

/// Archives: a name or a size that is accepted is within its limit.
pub fn tar(bytes: &[u8]) {
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
}

#[cfg(test)]
mod tests {
    use scratch::corpus::{corpus, each};

    #[test]
    fn no_bytes_make_the_reader_of_archives_panic() {
        each(&corpus("tar"), 2_000, super::tar);
    }

    #[test]
    fn no_bytes_of_a_registry_make_its_client_panic() {
        each(&corpus("registry"), 5_000, super::registry);
    }

    #[test]
    fn no_bytes_in_hosts_toml_make_its_reader_panic_and_what_it_refuses_has_a_line() {
        each(&corpus("hosts"), 2_000, super::hosts);
    }

    #[test]
    fn no_documents_make_an_image_endless_or_larger_than_its_bounds() {
        each(&corpus("image"), 5_000, super::image);
    }

    #[test]
    fn no_messages_of_a_stream_or_of_a_transfer_make_their_reader_panic_or_keep_memory() {
        each(&corpus("stream"), 1_000, super::stream);
    }

    #[test]
    fn no_requests_to_write_content_make_the_writer_panic_keep_a_reference_or_store_what_has_another_digest() {
        each(&corpus("write"), 200, super::write);
    }
}
