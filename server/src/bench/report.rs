//! Results as a Markdown table or as JSON.

use std::io::{self, Write};

use serde_json::Value;

/// A Markdown table whose rows are written when they are there. Columns are as wide as their widest cell so far.
pub(super) struct Table {
    header: Option<Vec<String>>,
    widths: Vec<usize>,
}

impl Table {
    /// A table with these columns.
    pub(super) fn new(columns: &[&str]) -> Self {
        let header: Vec<String> = columns.iter().map(|&name| name.to_owned()).collect();
        Self { widths: header.iter().map(|name| name.chars().count()).collect(), header: Some(header) }
    }

    /// Writes a row, and before the first one the header.
    pub(super) fn row(&mut self, out: &mut dyn Write, cells: &[String]) -> io::Result<()> {
        for (width, cell) in self.widths.iter_mut().zip(cells) {
            *width = (*width).max(cell.chars().count());
        }
        if let Some(header) = self.header.take() {
            self.line(out, &header)?;
            let rules: Vec<String> = self.widths.iter().map(|&width| "-".repeat(width)).collect();
            self.line(out, &rules)?;
        }
        self.line(out, cells)?;
        out.flush()
    }

    fn line(&self, out: &mut dyn Write, cells: &[String]) -> io::Result<()> {
        for (cell, width) in cells.iter().zip(&self.widths) {
            write!(out, "| {cell:width$} ")?;
        }
        writeln!(out, "|")
    }
}

/// Writes `records` as a JSON array, with a line feed at its end.
pub(super) fn write_json(out: &mut dyn Write, records: Vec<Value>) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, &Value::Array(records))?;
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_grows_with_its_cells() {
        let mut out = Vec::new();
        let mut table = Table::new(&["test", "t/s"]);
        for cells in [["pp512", "1.00 ± 0.1"], ["tg128 @ d4", "2"]] {
            table.row(&mut out, &cells.map(str::to_owned)).unwrap();
        }
        let expected = "| test  | t/s        |\n| ----- | ---------- |\n\
                        | pp512 | 1.00 ± 0.1 |\n| tg128 @ d4 | 2          |\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
