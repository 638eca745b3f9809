//! Links between the documents.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// Every relative link in `README.md`, `CHANGELOG.md` and `docs/` leads to a file that there is, and to a heading in it.
pub(crate) fn every_link_leads_to_a_file_and_a_heading_that_there_are() -> Result<()> {
    let documents = documents()?;
    let mut count = 0;
    for (path, text) in &documents {
        for link in links(text).filter(|link| !link.contains("://") && !link.starts_with("mailto:")) {
            count += 1;
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => clean(&path.parent().context("a file is in a folder")?.join(file)),
            };
            ensure!(target.exists(), "{}: {link} leads to no file", path.display());
            if let Some(text) = documents.get(&target).filter(|_| !heading.is_empty()) {
                ensure!(headings(text).any(|known| known == heading), "{}: {link} leads to no heading", path.display());
            }
        }
    }
    ensure!(documents.len() > 40 && count > 80, "{} documents, {count} links: they were not read", documents.len());
    Ok(())
}

/// Each document of `docs/` is named there.
pub(crate) fn the_readme_leads_to_every_document() -> Result<()> {
    let readme = fs::read_to_string(root().join("README.md"))?;
    for path in documents()?.keys().filter(|path| path.parent() == Some(&root().join("docs"))) {
        let name = path.file_name().context("a name")?.to_string_lossy();
        ensure!(links(&readme).any(|link| link == format!("docs/{name}")), "README.md has no link to docs/{name}");
    }
    Ok(())
}

fn root() -> PathBuf {
    clean(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
}

/// Their texts without code, which may look like links.
fn documents() -> Result<BTreeMap<PathBuf, String>> {
    let mut paths = vec![root().join("README.md"), root().join("CHANGELOG.md")];
    for folder in ["docs", "docs/decisions"] {
        for entry in fs::read_dir(root().join(folder))? {
            paths.push(entry?.path());
        }
    }
    let is_document = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "md");
    let read = |path: PathBuf| Ok((path.clone(), without_code(&fs::read_to_string(path)?)));
    paths.into_iter().filter(is_document).map(read).collect()
}

fn without_code(text: &str) -> String {
    let mut is_code = false;
    let is_prose = |line: &&str| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    };
    text.lines().filter(is_prose).collect::<Vec<_>>().join("\n")
}

/// The targets of `[text](target)`.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')'))
        .map(|(target, _)| target)
        .filter(|target| !target.contains([' ', '\n']))
}

/// The names by which headings are linked to.
fn headings(text: &str) -> impl Iterator<Item = String> {
    text.lines().filter(|line| line.starts_with('#')).map(|line| {
        let title = line.trim_start_matches('#').trim().to_lowercase();
        title.chars().filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter)).map(|c| if c == ' ' { '-' } else { c }).collect()
    })
}

/// Without `..`.
fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(clean.pop()),
            part => clean.push(part),
        }
    }
    clean
}
