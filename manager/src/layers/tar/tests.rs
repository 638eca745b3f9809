use super::*;
use crate::layers::testing::{Archive, entry};

fn all(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut reader = Reader::new(bytes, Limits::default());
    let mut found = Vec::new();
    while let Some(entry) = reader.next()? {
        let mut data = Vec::new();
        while let Some((offset, bytes)) = reader.data()? {
            data.resize(usize::try_from(offset).expect("small"), 0);
            data.extend_from_slice(bytes);
        }
        found.push((entry, data));
    }
    reader.drain()?;
    Ok(found)
}

fn names(bytes: &[u8]) -> Vec<String> {
    all(bytes).unwrap_or_else(|error| panic!("{}", crate::error::chain(&error))).iter().map(|(entry, _)| shown(&entry.path)).collect()
}

fn sentence(bytes: &[u8]) -> String {
    crate::error::chain(&all(bytes).expect_err("it is refused"))
}

#[test]
fn what_is_written_is_read_again() {
    let odd: Vec<u8> = (0x80..=0xff).chain(0x80..=0xfe).collect();
    assert_eq!(odd.len(), 255);
    let far = |seconds, nanos| Time { seconds, nanos };
    let attributes = vec![(b"user.a=b".to_vec(), b"x\ny\0".to_vec()), (b"user.empty".to_vec(), Vec::new())];
    // a key with `=` cannot be written in this format: Go and GNU tar have it end there
    let attributes = [(b"security.capability".to_vec(), vec![1, 0, 0, 2, 10])].into_iter().chain(attributes.into_iter().skip(1)).collect();
    let entries = [
        Entry { path: [&b"d/"[..], &odd].concat(), mode: 0o4755, ..entry("", Kind::File { size: 3 }) },
        Entry { mtime: far(-1, 0), uid: u32::MAX - 1, gid: 1 << 21, ..entry("d", Kind::Folder) },
        Entry { mtime: far(-2, 500_000_000), ..entry("f", Kind::Fifo) },
        Entry { mtime: far(1 << 33, 1), xattrs: attributes, ..entry("x", Kind::File { size: 0 }) },
        Entry { mtime: far(-1, 1), ..entry("c", Kind::Char { major: 4095, minor: 1_048_575 }) },
        entry("b", Kind::Block { major: 8, minor: 1 }),
        entry("s", Kind::Symlink { target: vec![b'y'; 3000] }),
        entry("h", Kind::HardLink { target: [&b"d/"[..], &odd].concat() }),
        entry(vec![b'z'; 100], Kind::Folder),
        entry(vec![b'z'; 101], Kind::Folder),
    ];
    let mut archive = Archive::default();
    for entry in &entries {
        archive = archive.entry(entry, if matches!(entry.kind, Kind::File { size: 3 }) { b"abc" } else { b"" });
    }
    let found = all(&archive.end()).expect("an archive");
    assert_eq!(found[0].1, b"abc");
    assert_eq!(found.into_iter().map(|(entry, _)| entry).collect::<Vec<_>>(), entries);
}

#[test]
fn a_size_in_pax_counts_for_what_follows_too() {
    // the header's own size is 0: who goes by that takes the data for headers, and sees a smuggled file
    let inner = Archive::default().file("smuggled", "x").0;
    let size = inner.len().to_string();
    let outer = Archive::default().pax(&[("size", size.as_bytes())]).raw(b'0', b"outer", "00000000000", |_| {}, &inner).file("last", "y");
    assert_eq!(names(&outer.end()), ["outer", "last"]);
    // shorter and longer than the header says
    let short = Archive::default().pax(&[("size", b"1")]).raw(b'0', b"a", "00000002000", |_| {}, b"x").file("last", "");
    assert_eq!(names(&short.end()), ["a", "last"]);
    let long = Archive::default().pax(&[("size", b"600")]).raw(b'0', b"a", "00000000001", |_| {}, &[b'x'; 600]).file("last", "");
    assert_eq!(names(&long.end()), ["a", "last"]);
    // a record without a value is none
    let empty =
        Archive::default().pax(&[("size", b""), ("path", b""), ("uid", b"")]).raw(b'0', b"a", "00000000001", |_| {}, b"x").file("b", "");
    assert_eq!(names(&empty.end()), ["a", "b"]);
}

#[test]
fn long_names_are_read_and_two_different_ones_are_refused() {
    let long = [b'n'; 300];
    let gnu = |archive: Archive, kind, name: &[u8]| {
        archive.raw(kind, b"././@LongLink", &format!("{:011o}", name.len() + 1), |_| {}, &[name, b"\0"].concat())
    };
    let named = gnu(Archive::default(), b'L', &long).raw(b'0', b"short", "00000000000", |_| {}, b"");
    assert_eq!(names(&named.end()), [shown(&long)]);
    let linked = gnu(gnu(Archive::default(), b'K', &long), b'L', b"name").raw(b'2', b"short", "", |block| block[157] = b't', b"");
    let (entry, _) = all(&linked.end()).expect("an archive").remove(0);
    assert_eq!((entry.path, entry.kind), (b"name".to_vec(), Kind::Symlink { target: long.to_vec() }));
    let both = |pax: &[u8]| gnu(Archive::default().pax(&[("path", pax)]), b'L', b"one").raw(b'0', b"short", "", |_| {}, b"").end();
    assert_eq!(names(&both(b"one")), ["one"]);
    assert!(sentence(&both(b"other")).contains("programs differ"));
}

#[test]
fn what_makes_no_sense_is_refused_with_its_place() {
    let raw = |change: fn(&mut [u8])| Archive::default().raw(b'0', b"name", "00000000000", change, b"").end();
    let field = |at: usize, value: &'static [u8]| {
        Archive::default().raw(b'0', b"name", "00000000000", move |block| block[at..at + value.len()].copy_from_slice(value), b"").end()
    };
    let device = |at: usize, value: &'static [u8]| {
        Archive::default().raw(b'3', b"name", "", move |block| block[at..at + value.len()].copy_from_slice(value), b"").end()
    };
    let lone = [&Archive::default().file("a", "").0[..], &[0; BLOCK], &Archive::default().file("b", "").end()].concat();
    let mut torn = Archive::default().file("a", "").end();
    torn[5] ^= 1;
    let short = &Archive::default().file("a", [b'x'; 1000]).0[..1024];
    let global = |key| {
        Archive::default()
            .pax(&[(key, b"1")])
            .0
            .iter()
            .enumerate()
            .map(|(at, byte)| if at == 156 { b'g' } else { *byte })
            .collect::<Vec<_>>()
    };
    let global = |key| {
        let mut bytes = global(key);
        let sum: u32 =
            bytes[..BLOCK].iter().enumerate().map(|(at, byte)| u32::from(if (148..156).contains(&at) { b' ' } else { *byte })).sum();
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes.extend(Archive::default().file("a", "").end());
        bytes
    };
    for (bytes, expected) in [
        (torn, "its checksum is"),
        (b"not an archive, but longer than a block of it".repeat(20), "octal digits"),
        (lone, "a block of zeros"),
        (short.to_vec(), "ends within the data of \"a\""),
        (raw(|block| block[0] = 0)[..100].to_vec(), "ends within a block"),
        (raw(|block| block[..4].fill(0)), "it has no name"),
        (raw(|block| block[156] = b'V'), "of type 'V'"),
        (field(108, b"\xff\xff\xff\xff\xff\xff\xff\xff"), "its uid is -1"),
        (field(116, b"\x80\0\0\0\xff\xff\xff\xff"), "its gid is 4294967295"),
        (field(124, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), "its size is -1"),
        (field(124, b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff"), "its size is"),
        (field(124, b"77777777777"), "ends within the data"),
        (field(124, b"00000000008"), "among its octal digits"),
        (device(329, b"0010000"), "its device number is 4096:0"),
        (device(337, b"4000000"), "its device number is 0:1048576"),
        (global("size"), "for all entries"),
        (global("path"), "for all entries"),
        (Archive::default().pax(&[("path", b"a\0b")]).file("a", "").end(), "has a NUL"),
        (Archive::default().pax(&[("uid", b"-1")]).file("a", "").end(), "its uid is -1"),
        (Archive::default().pax(&[("size", b"18446744073709551616")]).file("a", "").end(), "\"size\" is"),
        (Archive::default().pax(&[("mtime", b"soon")]).file("a", "").end(), "\"mtime\" is"),
        (Archive::default().pax(&[("path", b"a")]).pax(&[("path", b"b")]).file("a", "").end(), "two PAX headers"),
        (Archive::default().pax(&[("path", b"a")]).end(), "ends after the headers"),
        (Archive::default().raw(b'x', b"pax", "00000000010", |_| {}, b"999 a=b\n").file("a", "").end(), "PAX records are damaged"),
        (Archive::default().raw(b'L', b"long", "00010000000", |_| {}, b"").end(), "the limit is 1048576"),
        (Archive::default().raw(b'x', b"long", "00010000000", |_| {}, b"").end(), "the limit is 1048576"),
    ] {
        let sentence = sentence(&bytes);
        assert!(sentence.contains(expected), "{expected}: {sentence}");
    }
    assert_eq!(names(&global("comment")), ["a"]);
}

#[test]
fn sparse_files_are_read_in_each_format() {
    let mut expected = vec![0; 10_000];
    expected[1000..1003].copy_from_slice(b"abc");
    expected[9000..9002].copy_from_slice(b"de");
    let map = |pairs: &[(u64, u64)]| {
        pairs.iter().flat_map(|(offset, length)| format!("{offset:011o}\0{length:011o}\0").into_bytes()).collect::<Vec<_>>()
    };
    let gnu = |pairs: &[(u64, u64)], data: &[u8]| {
        let map = map(pairs);
        let size = format!("{:011o}", data.len());
        Archive::default().raw(
            b'S',
            b"sparse",
            &size,
            |block| {
                block[257..265].copy_from_slice(b"ustar  \0");
                block[386..386 + map.len()].copy_from_slice(&map);
                block[483..494].copy_from_slice(b"00000023420");
            },
            data,
        )
    };
    let size: &[u8] = b"10000";
    let zero = [
        ("GNU.sparse.size", size),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"1000"),
        ("GNU.sparse.numbytes", b"3"),
        ("GNU.sparse.offset", b"9000"),
        ("GNU.sparse.numbytes", b"2"),
    ];
    let one = [("GNU.sparse.size", size), ("GNU.sparse.name", b"sparse"), ("GNU.sparse.map", b"1000,3,9000,2")];
    let two = [("GNU.sparse.major", &b"1"[..]), ("GNU.sparse.minor", b"0"), ("GNU.sparse.name", b"sparse"), ("GNU.sparse.realsize", size)];
    let in_data = |text: &[u8], data: &[u8]| {
        let mut bytes = text.to_vec();
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        [&bytes[..], data].concat()
    };
    let two = |text: &[u8], data: &[u8]| {
        let data = in_data(text, data);
        Archive::default().pax(&two).raw(b'0', b"other", &format!("{:011o}", data.len()), |_| {}, &data)
    };
    for (name, archive) in [
        ("gnu", gnu(&[(1000, 3), (9000, 2)], b"abcde")),
        ("0.0", Archive::default().pax(&zero).raw(b'0', b"sparse", "00000000005", |_| {}, b"abcde")),
        ("0.1", Archive::default().pax(&one).raw(b'0', b"other", "00000000005", |_| {}, b"abcde")),
        ("1.0", two(b"2\n1000\n3\n9000\n2\n", b"abcde")),
    ] {
        let found = all(&archive.file("last", "x").end()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let [(sparse, data), (last, _)] = &found[..] else { panic!("{name}: {found:?}") };
        assert_eq!(
            (shown(&sparse.path), &sparse.kind, shown(&last.path)),
            ("sparse".to_owned(), &Kind::File { size: 10_000 }, "last".to_owned())
        );
        let mut data = data.clone();
        data.resize(10_000, 0);
        assert!(data == expected, "{name}");
    }
    for (archive, expected) in [
        (gnu(&[(9000, 3), (1000, 2)], b"abcde"), "not in order"),
        (gnu(&[(1000, 3), (1002, 2)], b"abcde"), "overlap"),
        (gnu(&[(1000, 3), (9999, 2)], b"abcde"), "outside"),
        (gnu(&[(1000, 3), (9000, 1)], b"abcde"), "has 4 bytes of data, and the archive 5"),
        (two(b"1\n1000\n", b""), "damaged"),
        (two(b"999999999\n", b""), "the limit is"),
        (two(b"x\n", b""), "damaged"),
        (two(b"99999999999999999999\n", b""), "large"),
        (two(&[b'1'; 600], b""), "damaged"),
    ] {
        let sentence = sentence(&archive.end());
        assert!(sentence.contains(expected), "{expected}: {sentence}");
    }
}

#[test]
fn no_bytes_make_the_reader_panic_or_take_long() {
    let good = Archive::default()
        .pax(&[("path", b"a"), ("mtime", b"-1.5"), ("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"1,3")])
        .raw(b'0', b"sparse", "00000000003", |_| {}, b"abc")
        .folder("d")
        .symlink("s", "t")
        .file("f", [7; 700])
        .end();
    let mut seed = 7_u64;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).expect("31 bits") % below
    };
    // what fuzzing begins with: archives of GNU tar
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/tar");
    let mut archives = vec![good];
    for entry in std::fs::read_dir(corpus).expect("a folder") {
        let bytes = std::fs::read(entry.expect("an entry").path()).expect("a file");
        all(&bytes).expect("an archive");
        archives.push(bytes);
    }
    assert!(archives.len() > 5);
    for attempt in 0..3000 {
        let mut bytes = archives[attempt % archives.len()].clone();
        for _change in 0..=random(3) {
            let at = random(bytes.len());
            bytes[at] = u8::try_from(random(256)).expect("a byte");
        }
        // so that headers are reached
        for at in (0..bytes.len()).step_by(BLOCK) {
            let sum: u32 =
                (at..at + BLOCK).map(|index| if (148..156).contains(&(index - at)) { 32 } else { u32::from(bytes[index]) }).sum();
            if bytes[at + 257..at + 262] == *b"ustar" {
                bytes[at + 148..at + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        bytes.truncate(random(bytes.len() + 1));
        // what sparse files say of their length is not written here
        let mut reader = Reader::new(&*bytes, Limits::default());
        while let Ok(Some(_)) = reader.next() {
            while let Ok(Some(_)) = reader.data() {}
        }
    }
}

#[test]
fn an_entry_has_no_more_extended_attributes_than_a_file_can_have() {
    let with = |count: usize| {
        let names: Vec<_> = (0..count).map(|number| format!("SCHILY.xattr.user.{number:05}")).collect();
        let records: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b"x"[..])).collect();
        Archive::default().pax(&records).file("a", "").end()
    };
    // names of eleven bytes with their ends
    assert_eq!(all(&with(5957)).expect("as many as there can be")[0].0.xattrs.len(), 5957);
    assert!(sentence(&with(5958)).contains("more extended attributes than a file can have"));
}

/// What other programs took for entries, and what we took for data, was how files were smuggled.
#[test]
fn gnu_tar_lists_the_same_entries() {
    let inner = Archive::default().file("smuggled", "x").0;
    let size = inner.len().to_string();
    let long = [b'n'; 300];
    let named = |archive: Archive| archive.raw(b'L', b"././@LongLink", "00000000455", |_| {}, &[&long[..], b"\0"].concat());
    for (what, archive) in [
        ("a size in PAX alone", Archive::default().pax(&[("size", size.as_bytes())]).raw(b'0', b"outer", "00000000000", |_| {}, &inner)),
        ("a smaller one", Archive::default().pax(&[("size", b"1")]).raw(b'0', b"a", "00000002000", |_| {}, b"x")),
        ("a larger one", Archive::default().pax(&[("size", b"600")]).raw(b'0', b"a", "00000000001", |_| {}, &[b'x'; 600])),
        ("the name that GNU has in a header of its own", named(Archive::default()).raw(b'0', b"short", "00000000000", |_| {}, b"")),
        ("the same name in both", named(Archive::default().pax(&[("path", &long)])).raw(b'0', b"short", "", |_| {}, b"")),
        ("an attribute between them", named(Archive::default().pax(&[("SCHILY.xattr.user.a", b"x")])).raw(b'0', b"short", "", |_| {}, b"")),
        ("a name in PAX", Archive::default().pax(&[("path", &long)]).raw(b'0', b"short", "00000000001", |_| {}, b"x")),
        ("a folder with a size", Archive::default().raw(b'5', b"d", "00000000000", |_| {}, b"")),
    ] {
        let bytes = archive.file("last", "y").end();
        let folder = scratch::Folder::new("listed");
        std::fs::write(folder.join("archive"), &bytes).expect("a file");
        let listed = std::process::Command::new("tar").arg("-tf").arg(folder.join("archive")).output().expect("GNU tar");
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let listed: Vec<_> = listed.lines().map(|name| name.trim_end_matches('/').to_owned()).collect();
        let found = all(&bytes).unwrap_or_else(|error| panic!("{what}: {}", crate::error::chain(&error)));
        let ours: Vec<_> = found.iter().map(|(entry, _)| String::from_utf8_lossy(&entry.path).trim_end_matches('/').to_owned()).collect();
        assert_eq!(ours, listed, "{what}");
    }
}
