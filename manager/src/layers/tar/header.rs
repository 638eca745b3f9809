//! One header block: its fields and checksum.
//!
//! ```text
//! name 0+100  mode 100+8  uid 108+8  gid 116+8  size 124+12  mtime 136+12  checksum 148+8  type 156  linkname 157+100
//! magic 257+8  uname 265+32  gname 297+32  major 329+8  minor 337+8  prefix 345+155
//! old GNU sparse: map 386+4*24  more 482  length 483+12
//! ```

use super::BLOCK;
use super::sparse::Parts;

/// A header whose checksum is right.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header<'b>(&'b [u8; BLOCK]);

/// Which dialect a header is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    V7,
    Ustar,
    /// POSIX with a shorter prefix, from star.
    Star,
    Gnu,
}

impl<'b> Header<'b> {
    /// Errors: the checksum is wrong.
    pub(super) fn new(block: &'b [u8; BLOCK]) -> Result<Self, String> {
        let stored = octal(&block[148..156])?.ok_or("it has no checksum")?;
        let blanked = |index: usize, byte: u8| if (148..156).contains(&index) { b' ' } else { byte };
        let unsigned: u64 = block.iter().enumerate().map(|(index, byte)| u64::from(blanked(index, *byte))).sum();
        // some old programs took bytes as signed
        let signed: i64 = block.iter().enumerate().map(|(index, byte)| i64::from(blanked(index, *byte).cast_signed())).sum();
        if stored == unsigned || i64::try_from(stored) == Ok(signed) {
            Ok(Self(block))
        } else {
            Err(format!("its checksum is {unsigned:o}, not {stored:o}: the archive is damaged, or no tar archive"))
        }
    }

    fn dialect(self) -> Dialect {
        match &self.0[257..265] {
            b"ustar\x0000" if &self.0[508..512] == b"tar\0" => Dialect::Star,
            b"ustar  \0" => Dialect::Gnu,
            magic if magic.starts_with(b"ustar\0") => Dialect::Ustar,
            _ => Dialect::V7,
        }
    }

    pub(super) fn is_gnu(self) -> bool {
        self.dialect() == Dialect::Gnu
    }

    /// The type; an archive of V7 knows no extensions.
    pub(super) fn kind(self) -> u8 {
        self.0[156]
    }

    pub(super) fn path(self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = match self.dialect() {
            Dialect::Ustar => text(&self.0[345..500]),
            Dialect::Star => text(&self.0[345..476]),
            Dialect::V7 | Dialect::Gnu => b"",
        };
        if prefix.is_empty() { name.to_owned() } else { [prefix, name].join(&b'/') }
    }

    pub(super) fn link(self) -> &'b [u8] {
        text(&self.0[157..257])
    }

    pub(super) fn mode(self) -> Result<u32, String> {
        // upper bits have the file's type in some archives
        number("mode", &self.0[100..108]).map(|mode| u32::try_from(mode & 0o7777).unwrap_or_default())
    }

    pub(super) fn uid(self) -> Result<i64, String> {
        number("uid", &self.0[108..116])
    }

    pub(super) fn gid(self) -> Result<i64, String> {
        number("gid", &self.0[116..124])
    }

    pub(super) fn size(self) -> Result<u64, String> {
        unsigned("size", &self.0[124..136])
    }

    pub(super) fn mtime(self) -> Result<i64, String> {
        number("mtime", &self.0[136..148])
    }

    /// Major and minor number.
    pub(super) fn device(self) -> Result<(u64, u64), String> {
        if self.dialect() == Dialect::V7 {
            return Ok((0, 0));
        }
        Ok((unsigned("device's major number", &self.0[329..337])?, unsigned("device's minor number", &self.0[337..345])?))
    }

    /// Of an old GNU sparse header: the first part of the map, whether blocks with more of it follow, and the length of the file.
    pub(super) fn sparse(self) -> Result<(Parts, bool, u64), String> {
        Ok((map(&self.0[386..482])?, self.0[482] != 0, unsigned("length", &self.0[483..495])?))
    }
}

/// The part of a sparse map that is in a block of its own, and whether another follows.
pub(super) fn more_sparse(block: &[u8; BLOCK]) -> Result<(Parts, bool), String> {
    Ok((map(&block[..504])?, block[504] != 0))
}

fn map(bytes: &[u8]) -> Result<Parts, String> {
    let pairs = bytes.chunks_exact(24).take_while(|pair| pair[0] != 0);
    pairs.map(|pair| Ok((unsigned("offset", &pair[..12])?, unsigned("length", &pair[12..])?))).collect()
}

fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn unsigned(what: &str, field: &[u8]) -> Result<u64, String> {
    let number = number(what, field)?;
    u64::try_from(number).map_err(|_| format!("its {what} is {number}"))
}

/// A number in octal digits, or in base 256 with the first bit set, two's complement; absent is 0.
fn number(what: &str, field: &[u8]) -> Result<i64, String> {
    let [first, rest @ ..] = field else { return Ok(0) };
    if first & 0x80 == 0 {
        let number = octal(field).map_err(|why| format!("its {what} {why}"))?.unwrap_or_default();
        return i64::try_from(number).map_err(|_| format!("its {what} is {number}"));
    }
    let is_negative = first & 0x40 != 0;
    let mut number = if is_negative { i128::from(*first) - 0x100 } else { i128::from(first & 0x7f) };
    for byte in rest {
        number = number << 8 | i128::from(*byte);
    }
    i64::try_from(number).map_err(|_| format!("its {what} is {number}"))
}

/// Digits with blanks and NULs around them; none if there are no digits.
fn octal(field: &[u8]) -> Result<Option<u64>, String> {
    let is_blank = |byte: &u8| matches!(byte, b' ' | 0);
    let digits = field.iter().skip_while(|byte| is_blank(byte));
    let (mut number, mut seen, mut has_ended) = (0_u64, false, false);
    for byte in digits {
        match byte {
            b'0'..=b'7' if !has_ended => {
                number = number << 3 | u64::from(byte - b'0');
                seen = true;
            }
            byte if is_blank(byte) => has_ended = true,
            // what comes after the NUL that ends a field is none of its value
            _ if has_ended => break,
            byte => return Err(format!("has a byte {byte:#04x} among its octal digits")),
        }
    }
    Ok(seen.then_some(number))
}
