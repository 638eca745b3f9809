//! What was measured, and how it is printed: a table in Markdown, or JSON.

use serde_json::{Map, Value, json};

/// A median with its quartiles, or a single value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Figure {
    pub(super) median: f64,
    /// The first and the third quartile; none of a single value.
    pub(super) quartiles: Option<(f64, f64)>,
}

impl Figure {
    /// The figure of samples; none without any.
    pub(super) fn of(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        let last = samples.len().checked_sub(1)?;
        let at = |part: f64| {
            let place = last as f64 * part;
            let (below, above) = (samples[place.floor() as usize], samples[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        let quartiles = (last > 0).then(|| (at(0.25), at(0.75)));
        Some(Self { median: at(0.5), quartiles })
    }

    pub(super) fn single(value: f64) -> Self {
        Self { median: value, quartiles: None }
    }

    fn json(self) -> Value {
        match self.quartiles {
            Some((first, third)) => json!({ "median": self.median, "first_quartile": first, "third_quartile": third }),
            None => json!({ "median": self.median }),
        }
    }
}

/// The figures of one shim, by section and name, in the order in which they were noted.
#[derive(Debug, Default)]
pub(super) struct Figures {
    section: String,
    all: Vec<(String, String, Figure)>,
}

impl Figures {
    /// What is noted from now on belongs to that section.
    pub(super) fn begin(&mut self, section: &str) {
        section.clone_into(&mut self.section);
    }

    pub(super) fn note(&mut self, name: &str, figure: Figure) {
        self.all.push((self.section.clone(), name.to_owned(), figure));
    }

    pub(super) fn get(&self, section: &str, name: &str) -> Option<Figure> {
        self.all.iter().find(|(its, named, _)| its == section && named == name).map(|(_, _, figure)| *figure)
    }
}

/// One column: the name of a shim, and its figures.
pub(super) type Column<'a> = (&'a str, &'a Figures);

/// A table for each section, with the ratios to the first column.
pub(super) fn markdown(columns: &[Column<'_>]) -> String {
    let mut text = String::new();
    for (section, names) in rows(columns) {
        text.push_str(&format!("## {section}\n\n| |"));
        for (name, _) in columns {
            text.push_str(&format!(" {name} |"));
        }
        text.push_str(&format!("\n| --- |{}\n", " ---: |".repeat(columns.len())));
        for name in names {
            text.push_str(&format!("| {name} |"));
            let first = columns.first().and_then(|(_, figures)| figures.get(section, name));
            for (index, (_, figures)) in columns.iter().enumerate() {
                let ratio_to = first.filter(|_| index > 0);
                text.push_str(&format!(" {} |", figures.get(section, name).map_or(String::new(), |figure| cell(figure, ratio_to))));
            }
            text.push('\n');
        }
        text.push('\n');
    }
    text
}

fn cell(figure: Figure, ratio_to: Option<Figure>) -> String {
    let mut text = number(figure.median);
    if let Some((first, third)) = figure.quartiles {
        text.push_str(&format!(" ({}–{})", number(first), number(third)));
    }
    if let Some(other) = ratio_to.filter(|other| other.median > 0.0) {
        text.push_str(&format!(" ×{:.2}", figure.median / other.median));
    }
    text
}

fn number(value: f64) -> String {
    match value {
        value if value == value.trunc() && value.abs() < 1e6 => format!("{value:.0}"),
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

/// Everything, by column, section and name.
pub(super) fn json(columns: &[Column<'_>]) -> Value {
    let mut all = Map::new();
    for (column, figures) in columns {
        let mut sections = Map::new();
        for (section, name, figure) in &figures.all {
            sections.entry(section.clone()).or_insert_with(|| json!({}))[name.as_str()] = figure.json();
        }
        all.insert((*column).to_owned(), Value::Object(sections));
    }
    Value::Object(all)
}

/// The names of each section's rows; a row may be missing in some columns.
fn rows<'a>(columns: &[Column<'a>]) -> Vec<(&'a str, Vec<&'a str>)> {
    let mut sections: Vec<(&str, Vec<&str>)> = Vec::new();
    for (section, name, _) in columns.iter().flat_map(|(_, figures)| &figures.all) {
        let at = sections.iter().position(|(its, _)| its == section).unwrap_or_else(|| {
            sections.push((section, Vec::new()));
            sections.len() - 1
        });
        if !sections[at].1.contains(&name.as_str()) {
            sections[at].1.push(name);
        }
    }
    sections
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_interpolated() {
        let figure = Figure::of(vec![4.0, 1.0, 3.0, 2.0]).expect("there are samples");
        assert_eq!(figure, Figure { median: 2.5, quartiles: Some((1.75, 3.25)) });
        assert_eq!(Figure::of(vec![7.0]), Some(Figure::single(7.0)));
        assert_eq!(Figure::of(Vec::new()), None);
    }

    #[test]
    fn a_table_has_ratios_to_the_first_column_and_empty_cells() {
        let (mut first, mut second) = (Figures::default(), Figures::default());
        for (figures, value) in [(&mut first, 4.0), (&mut second, 1.0)] {
            figures.begin("Latency");
            figures.note("ms", Figure { median: value, quartiles: Some((value / 2.0, value * 2.0)) });
        }
        second.note("only here", Figure::single(12.34));
        let expected = "## Latency\n\n| | a | b |\n| --- | ---: | ---: |\n| ms | 4 (2–8) | 1 (0.50–2) ×0.25 |\n| only here |  | 12.3 |\n\n";
        assert_eq!(markdown(&[("a", &first), ("b", &second)]), expected);
        assert_eq!(json(&[("b", &second)])["b"]["Latency"]["only here"], json!({ "median": 12.34 }));
    }
}
