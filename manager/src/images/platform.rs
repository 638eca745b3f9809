//! Platforms: the only place that chooses what of an image is for which machine.
//!
//! A platform takes what is built for it, and for older variants of its architecture: `amd64/v3` takes `amd64/v2`, and `arm/v7` takes
//! `arm/v6`. The nearest is chosen, and everything that is equally near: an index may have one layer's contents in two compressions.

/// A machine that an image is for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Platform {
    pub(crate) os: String,
    pub(crate) architecture: String,
    /// Empty for the first one.
    pub(crate) variant: String,
}

/// Platforms that a client asks for, the one that it prefers first; none for all that there are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Platforms(Vec<Platform>);

impl Platform {
    /// One from the names that clients and images use, several of which may mean the same.
    pub(crate) fn new(os: &str, architecture: &str, variant: &str) -> Self {
        let (os, variant) = (os.to_ascii_lowercase(), variant.to_ascii_lowercase());
        let architecture = architecture.to_ascii_lowercase();
        let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
            ("x86_64" | "x86-64", variant) => ("amd64", variant),
            ("i386", _) => ("386", ""),
            ("aarch64", variant) => ("arm64", variant),
            ("armhf", "") => ("arm", "v7"),
            ("armel", "") => ("arm", "v6"),
            (architecture, variant) => (architecture, variant),
        };
        let variant = match (architecture, variant) {
            ("amd64", "v1" | "1") | ("arm64", "8" | "v8" | "v8.0") => "",
            ("arm", "") => "v7",
            (_, variant) => variant,
        };
        let has_number_only = variant.starts_with(|first: char| first.is_ascii_digit());
        let variant = if has_number_only { format!("v{variant}") } else { variant.to_owned() };
        Self { os: if os == "macos" { "darwin".to_owned() } else { os }, architecture: architecture.to_owned(), variant }
    }

    /// The machine that this program runs on.
    pub(crate) fn host() -> Self {
        Self::new("linux", std::env::consts::ARCH, "")
    }

    /// How far something that is built for another platform is from what this one has; none if it cannot be used.
    fn distance(&self, offered: &Self) -> Option<u32> {
        if self.os != offered.os || self.architecture != offered.architecture {
            return None;
        }
        if self.variant == offered.variant {
            return Some(0);
        }
        let age = |platform: &Self| -> Option<u32> {
            let first = match platform.architecture.as_str() {
                "amd64" => 1,
                "arm64" => 8,
                "arm" => 7,
                _ => return None,
            };
            if platform.variant.is_empty() {
                return Some(first * 100);
            }
            let text = platform.variant.strip_prefix('v')?;
            let (major, minor) = text.split_once('.').unwrap_or((text, "0"));
            let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
            (major < 100 && minor < 100).then_some(major * 100 + minor)
        };
        age(self)?.checked_sub(age(offered)?)
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |text: &str| text.chars().take(30).collect::<String>();
        write!(f, "{}/{}", shown(&self.os), shown(&self.architecture))?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", shown(&self.variant)) }
    }
}

impl Platforms {
    /// These.
    pub(crate) fn of(platforms: impl IntoIterator<Item = Platform>) -> Self {
        Self(platforms.into_iter().collect())
    }

    /// Whether everything is asked for.
    pub(crate) fn are_all(&self) -> bool {
        self.0.is_empty()
    }

    /// How many are asked for.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// Which of these to take, in the order of preference: of each platform that is asked for the nearest. What is for no platform in
    /// particular comes last, as it may be for any.
    pub(crate) fn choose<'a>(&self, offered: impl IntoIterator<Item = Option<&'a Platform>>) -> Vec<usize> {
        let offered: Vec<_> = offered.into_iter().collect();
        if self.are_all() {
            return (0..offered.len()).collect();
        }
        let mut chosen = Vec::new();
        for wanted in &self.0 {
            let distances: Vec<_> = offered.iter().map(|offered| wanted.distance((*offered)?)).collect();
            let Some(nearest) = distances.iter().flatten().min() else { continue };
            let these = distances.iter().enumerate().filter(|(_, distance)| distance.as_ref() == Some(nearest)).map(|(index, _)| index);
            chosen.extend(these.filter(|index| !chosen.contains(index)).collect::<Vec<_>>());
        }
        chosen.extend(offered.iter().enumerate().filter(|(_, offered)| offered.is_none()).map(|(index, _)| index));
        chosen
    }
}

impl std::fmt::Display for Platforms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.are_all() {
            return f.write_str("any platform");
        }
        let names: Vec<_> = self.0.iter().take(10).map(ToString::to_string).collect();
        f.write_str(&names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Platform {
        let mut parts = text.split('/');
        let mut next = || parts.next().unwrap_or_default();
        Platform::new(next(), next(), next())
    }

    #[test]
    fn the_nearest_variant_is_chosen_whatever_the_order_of_an_index() {
        for (wanted, offered, expected) in [
            ("linux/amd64", &["linux/arm64", "linux/amd64"][..], &["linux/amd64"][..]),
            ("linux/amd64", &["linux/amd64/v2", "linux/amd64/v1"], &["linux/amd64"]),
            ("linux/amd64", &["linux/amd64/v2"], &[]),
            ("linux/amd64/v3", &["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], &["linux/amd64/v2"]),
            ("linux/x86_64", &["linux/amd64"], &["linux/amd64"]),
            ("linux/arm64", &["linux/arm64/v8", "linux/arm64/v9"], &["linux/arm64"]),
            ("linux/arm64", &["linux/arm64/v8.2"], &[]),
            ("linux/arm64/v8.2", &["linux/arm64", "linux/arm64/v8.1", "linux/arm64/v8.4"], &["linux/arm64/v8.1"]),
            ("linux/arm64/v9", &["linux/arm64/v8", "linux/arm64/v8.2"], &["linux/arm64/v8.2"]),
            ("linux/arm", &["linux/arm/v5", "linux/arm/v6", "linux/arm/v8"], &["linux/arm/v6"]),
            ("linux/arm/v6", &["linux/arm/v7", "linux/arm"], &[]),
            ("linux/arm/v7", &["linux/armhf", "linux/arm/v6"], &["linux/arm"]),
            ("linux/riscv64", &["linux/riscv64", "linux/riscv64/x"], &["linux/riscv64"]),
            ("linux/amd64", &["unknown/unknown", "windows/amd64"], &[]),
        ] {
            for turn in 0..offered.len() {
                let mut offered: Vec<_> = offered.iter().map(|text| parse(text)).collect();
                offered.rotate_left(turn);
                let chosen = Platforms::of([parse(wanted)]).choose(offered.iter().map(Some));
                let chosen: Vec<_> = chosen.into_iter().map(|index| offered[index].clone()).collect();
                let expected: Vec<_> = expected.iter().map(|text| parse(text)).collect();
                assert_eq!(chosen, expected, "{wanted} of {offered:?}");
            }
        }
    }

    #[test]
    fn what_is_equally_near_or_for_no_platform_is_taken_too() {
        let (amd, arm) = (parse("linux/amd64"), parse("linux/arm64"));
        let offered = [Some(&arm), None, Some(&amd), Some(&amd)];
        assert_eq!(Platforms::of([amd.clone()]).choose(offered), [2, 3, 1]);
        assert_eq!(Platforms::of([amd.clone(), arm.clone()]).choose(offered), [2, 3, 0, 1]);
        assert_eq!(Platforms::default().choose(offered), [0, 1, 2, 3]);
    }
}
