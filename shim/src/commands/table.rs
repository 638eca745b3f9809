//! Tables for a terminal.

/// Lays out rows in columns, the first row their titles. Cells are escaped: they hold names that clients have chosen.
pub(crate) fn lay_out(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Replaces characters that would move a terminal's cursor or break the table.
pub(crate) fn printable(cell: &str) -> String {
    cell.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["A", "BB"], vec!["üü", "x\x1b[2J"], vec!["1"]].map(|row| row.into_iter().map(str::to_owned).collect());
        assert_eq!(lay_out(&rows), "A   BB\nüü  x?[2J\n1\n");
    }
}
