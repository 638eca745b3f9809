//! A plot of medians and quartiles as SVG: one panel for each row of the table, one bar for each shim.

use super::report::{Column, Figure};

const WIDTH: f64 = 760.0;
/// Where bars begin: the names are left of it.
const LEFT: f64 = 150.0;
/// Where the longest whisker ends: the values are right of it.
const RIGHT: f64 = 590.0;
const BAR: f64 = 18.0;
const ROW: f64 = 28.0;
const TITLE: f64 = 34.0;
const COLOURS: [&str; 6] = ["#8a8a8a", "#b5b5b5", "#9fc5e8", "#6fa8dc", "#1f6fb2", "#0b3d66"];

/// One panel: its title, and the section and name of its figures.
pub(super) type Panel<'a> = (&'a str, &'a str, &'a str);

/// The plot; panels without figures are left out.
pub(super) fn svg(panels: &[Panel<'_>], columns: &[Column<'_>]) -> String {
    let (mut body, mut top) = (String::new(), 0.0);
    for (title, section, name) in panels {
        let bars: Vec<_> = columns.iter().filter_map(|(column, figures)| Some((*column, figures.get(section, name)?))).collect();
        if bars.is_empty() {
            continue;
        }
        body.push_str(&format!("<text x=\"{LEFT}\" y=\"{}\" class=\"title\">{}</text>\n", top + TITLE - 12.0, escaped(title)));
        top += TITLE;
        let longest = bars.iter().map(|(_, figure)| figure.quartiles.map_or(figure.median, |(_, third)| third.max(figure.median)));
        let longest = longest.fold(f64::MIN_POSITIVE, f64::max);
        for (index, (column, figure)) in bars.iter().enumerate() {
            body.push_str(&bar(column, *figure, top, longest, COLOURS[index % COLOURS.len()]));
            top += ROW;
        }
        top += ROW / 2.0;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {top}\" width=\"{WIDTH}\" height=\"{top}\">\n\
         <style>text{{font:13px sans-serif;fill:#222}}.title{{font-weight:bold}}.name{{text-anchor:end}}</style>\n\
         <rect width=\"{WIDTH}\" height=\"{top}\" fill=\"#fff\"/>\n{body}</svg>\n"
    )
}

fn bar(name: &str, figure: Figure, top: f64, longest: f64, colour: &str) -> String {
    let place = |value: f64| LEFT + (RIGHT - LEFT) * value / longest;
    let (middle, baseline) = (top + BAR / 2.0, top + BAR - 4.5);
    let mut text = format!("<text x=\"{}\" y=\"{baseline}\" class=\"name\">{}</text>\n", LEFT - 8.0, escaped(name));
    text.push_str(&format!(
        "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\n",
        place(figure.median) - LEFT
    ));
    let mut label = format!("{:.1}", figure.median);
    if let Some((first, third)) = figure.quartiles {
        let (low, high) = (place(first), place(third));
        text.push_str(&format!(
            "<path d=\"M{low:.1} {middle}H{high:.1}M{low:.1} {}v8M{high:.1} {}v8\" stroke=\"#222\" fill=\"none\"/>\n",
            middle - 4.0,
            middle - 4.0
        ));
        label.push_str(&format!(" ({first:.1}–{third:.1})"));
    }
    text.push_str(&format!("<text x=\"{}\" y=\"{baseline}\">{label}</text>\n", RIGHT + 12.0));
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::report::Figures;
    use super::*;

    #[test]
    fn the_longest_whisker_ends_at_the_right_and_empty_panels_are_left_out() {
        let mut figures = Figures::default();
        figures.begin("s");
        figures.note("n", Figure { median: 5.0, quartiles: Some((2.5, 10.0)) });
        let svg = svg(&[("a & b", "s", "n"), ("none", "s", "other")], &[("<x>", &figures)]);
        assert!(svg.contains("width=\"220.0\" height=\"18\"") && svg.contains("H590.0"), "{svg}");
        assert!(svg.contains("&lt;x&gt;") && svg.contains("a &amp; b") && !svg.contains("none</text>"), "{svg}");
    }
}
