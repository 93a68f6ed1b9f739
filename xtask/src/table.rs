//! Tables for a terminal: columns as wide as their widest cell, numbers to the right, but remarks at the end.

use std::fmt;

/// A table with a heading.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub(crate) fn new(heading: &[&str]) -> Self {
        Self { rows: vec![heading.iter().map(|&cell| cell.to_owned()).collect()] }
    }

    /// One more row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn width(&self, column: usize) -> usize {
        self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, row) in self.rows.iter().enumerate() {
            let cells = row.iter().enumerate().map(|(column, cell)| {
                let width = self.width(column);
                let is_number =
                    column + 1 < row.len() && cell.starts_with(|first: char| first.is_ascii_digit());
                if is_number { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            });
            writeln!(formatter, "  {}", cells.collect::<Vec<_>>().join("   ").trim_end())?;
            if index == 0 {
                let total: usize = (0..row.len()).map(|column| self.width(column) + 3).sum();
                writeln!(formatter, "  {}", "-".repeat(total.saturating_sub(3)))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(&["what", "value", "remark"]);
        table.row(vec!["write".to_owned(), "1.5 us".to_owned(), "2 ends".to_owned()]);
        table.row(vec!["x".to_owned(), "100.5 us".to_owned(), "none".to_owned()]);
        let expected = "  what    value      remark\n  -------------------------\n  \
                        write     1.5 us   2 ends\n  x       100.5 us   none\n";
        assert_eq!(table.to_string(), expected);
    }
}
