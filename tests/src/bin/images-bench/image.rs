//! Images to measure with: text-like files in layers, as an OCI layout in an archive.

use std::fs::{self, File};
use std::io::{BufWriter, Read as _, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

/// How layers are compressed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    Gzip,
    Zstd,
}

/// How large the files are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    Large,
    Small,
}

impl Size {
    fn bytes(self) -> usize {
        match self {
            Self::Large => 1 << 20,
            Self::Small => 16 << 10,
        }
    }
}

pub(crate) fn name(codec: Codec, size: Size) -> &'static str {
    match (codec, size) {
        (Codec::Gzip, Size::Large) => "gzip",
        (Codec::Zstd, Size::Large) => "zstd",
        (Codec::Gzip, Size::Small) => "gzip-small",
        (Codec::Zstd, Size::Small) => "zstd-small",
    }
}

/// An image in a folder.
pub(crate) struct Image {
    folder: PathBuf,
}

impl Image {
    pub(crate) fn at(folder: &Path, codec: Codec, size: Size) -> Self {
        Self { folder: folder.join(name(codec, size)) }
    }

    /// What `ctr images import` takes.
    pub(crate) fn archive(&self) -> PathBuf {
        self.folder.join("image.tar")
    }

    /// Makes one of so many MiB of files.
    pub(crate) fn make(folder: &Path, codec: Codec, size: Size, mib: usize, layers: usize) -> Result<()> {
        let image = Self::at(folder, codec, size);
        let blobs = image.folder.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        let mut words = Words::new();
        let files = (mib << 20) / layers / size.bytes();
        let (mut diff_ids, mut described) = (Vec::new(), Vec::new());
        let (tar, compressed) = (image.folder.join("layer.tar"), image.folder.join("layer"));
        for layer in 0..layers {
            let mut writer = BufWriter::new(File::create(&tar)?);
            for file in 0..files {
                let mut data = vec![0; size.bytes()];
                words.fill(&mut data);
                entry(&mut writer, &format!("layer{layer}/folder{}/file{file}", file / 100), &data)?;
            }
            writer.write_all(&[0; 1024])?;
            writer.into_inner()?.sync_all()?;
            diff_ids.push(hash(&tar)?);
            let program: &[&str] = if codec == Codec::Gzip { &["gzip", "-6"] } else { &["zstd", "-q", "-3"] };
            let output = File::create(&compressed)?;
            let status = Command::new(program[0]).args(&program[1..]).arg("-c").arg(&tar).stdout(output).status()?;
            ensure!(status.success(), "{program:?}: {status}");
            let suffix = if codec == Codec::Gzip { "gzip" } else { "zstd" };
            described.push(store(&blobs, &compressed, &format!("application/vnd.oci.image.layer.v1.tar+{suffix}"))?);
        }
        fs::remove_file(&tar)?;
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let rootfs = format!(r#"{{"type":"layers","diff_ids":{diff_ids:?}}}"#);
        let config = format!(r#"{{"architecture":"{architecture}","os":"linux","config":{{}},"rootfs":{rootfs}}}"#);
        let config = image.document(&blobs, &config, "application/vnd.oci.image.config.v1+json")?;
        let manifest = format!(r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{config},"layers":[{}]}}"#, described.join(","));
        let manifest = image.document(&blobs, &manifest, MANIFEST)?;
        let named =
            manifest.replacen('{', &format!(r#"{{"annotations":{{"io.containerd.image.name":"bench/{}:1"}},"#, name(codec, size)), 1);
        fs::write(image.folder.join("index.json"), format!(r#"{{"schemaVersion":2,"manifests":[{named}]}}"#))?;
        fs::write(image.folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let digest = manifest.split('"').find(|word| word.starts_with("sha256:")).context("a digest")?.to_owned();
        fs::write(image.folder.join("manifest"), digest)?;
        let mut pack = Command::new("tar");
        // by name, as containerd's own exports have them: what comes first says how early a daemon knows what the layers are
        pack.arg("-C").arg(&image.folder).args(["--sort=name", "-cf"]).arg(image.archive()).args(["blobs", "index.json", "oci-layout"]);
        ensure!(pack.status()?.success());
        Ok(())
    }

    fn document(&self, blobs: &Path, text: &str, media_type: &str) -> Result<String> {
        let path = self.folder.join("document");
        fs::write(&path, text)?;
        store(blobs, &path, media_type)
    }
}

/// Names a file by its digest, and returns its descriptor.
fn store(blobs: &Path, file: &Path, media_type: &str) -> Result<String> {
    let (digest, size) = (hash(file)?, fs::metadata(file)?.len());
    fs::rename(file, blobs.join(digest.trim_start_matches("sha256:")))?;
    Ok(format!(r#"{{"mediaType":"{media_type}","digest":"{digest}","size":{size}}}"#))
}

fn hash(path: &Path) -> Result<String> {
    let (mut file, mut hasher, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
    }
    let hex: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sha256:{hex}"))
}

/// A file in an archive.
fn entry(writer: &mut impl Write, path: &str, data: &[u8]) -> Result<()> {
    let mut block = [0; 512];
    block[..path.len()].copy_from_slice(path.as_bytes());
    block[100..107].copy_from_slice(b"0000644");
    block[108..115].copy_from_slice(b"0000000");
    block[116..123].copy_from_slice(b"0000000");
    block[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
    block[136..147].copy_from_slice(b"14000000000");
    block[156] = b'0';
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    writer.write_all(&block)?;
    writer.write_all(data)?;
    writer.write_all(&vec![0; data.len().next_multiple_of(512) - data.len()])?;
    Ok(())
}

/// Text that compresses to about a third, always the same.
struct Words {
    state: u64,
    known: Vec<Vec<u8>>,
}

impl Words {
    fn new() -> Self {
        let mut words = Self { state: 0x9e37_79b9_7f4a_7c15, known: Vec::new() };
        for _word in 0..8192 {
            let length = 3 + words.next() % 9;
            let word: Vec<u8> = (0..length).map(|_| b'a' + u8::try_from(words.next() % 26).unwrap_or(0)).chain([b' ']).collect();
            words.known.push(word);
        }
        words
    }

    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    fn fill(&mut self, data: &mut [u8]) {
        let mut at = 0;
        while at < data.len() {
            let number = usize::try_from(self.next() % 8192).unwrap_or(0);
            let word = &self.known[number];
            let count = word.len().min(data.len() - at);
            data[at..at + count].copy_from_slice(&word[..count]);
            at += count;
        }
    }
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
