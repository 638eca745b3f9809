//! Compression of layers: found out by their first bytes, never by what they are called.
//!
//! gzip with any number of members, zstd with any number of frames and skippable ones between, or none.

use std::io::{self, BufReader, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Plain,
    Gzip,
    Zstd,
}

/// The compressed bytes, with the first ones put back.
type Whole<R> = BufReader<Chain<Cursor<Vec<u8>>, R>>;

/// A layer's uncompressed bytes.
pub(crate) enum Decoder<R: Read> {
    Plain(Whole<R>),
    Gzip(Box<MultiGzDecoder<Whole<R>>>),
    Zstd(zstd::Decoder<'static, Whole<R>>),
}

impl<R: Read> Decoder<R> {
    /// One for what the first bytes say.
    pub(crate) fn new(mut source: R) -> io::Result<Self> {
        let mut first = Vec::new();
        source.by_ref().take(MAGIC_BYTES).read_to_end(&mut first)?;
        let compression = sniff(&first);
        let whole = BufReader::with_capacity(INPUT_BYTES, Cursor::new(first).chain(source));
        Ok(match compression {
            Compression::Plain => Self::Plain(whole),
            Compression::Gzip => Self::Gzip(Box::new(MultiGzDecoder::new(whole))),
            Compression::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(whole)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Self::Zstd(decoder)
            }
        })
    }

    /// What it found.
    pub(crate) fn compression(&self) -> Compression {
        match self {
            Self::Plain(_) => Compression::Plain,
            Self::Gzip(_) => Compression::Gzip,
            Self::Zstd(_) => Compression::Zstd,
        }
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(source) => source.read(buffer),
            Self::Gzip(source) => source.read(buffer).map_err(|error| damaged("gzip", &error)),
            Self::Zstd(source) => source.read(buffer).map_err(|error| damaged("zstd", &error)),
        }
    }
}

fn damaged(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("its {what} data is damaged, cut off, or followed by something else: {error}"))
}

fn sniff(first: &[u8]) -> Compression {
    match first {
        [0x1f, 0x8b, 0x08, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
        _ => Compression::Plain,
    }
}

const MAGIC_BYTES: u64 = 4;
const INPUT_BYTES: usize = 128 << 10;
/// Frames with a larger window are refused: it is kept in memory. 128 MiB, as much as the format asks decoders to take, and more than any
/// level of the reference compressor uses by itself.
const ZSTD_WINDOW_LOG: u32 = 27;
