//! HTML pages in one file: no scripts, nothing from the network, light and dark as the reader's system is.

use std::fmt::Write;

/// Colours that differ in lightness too; taken in this order by charts.
const STYLE: &str = ":root{color-scheme:light dark;--bg:#fff;--fg:#1a1c20;--soft:#5a6070;--line:#d5d8de;--mark:#e8f0fe;\
--c0:#0b62c4;--c1:#c2410c;--c2:#0f7b5f;--c3:#8b2fc9;--c4:#b0235f;--c5:#6b6f00;--c6:#00788f;--c7:#5b4636}\
@media(prefers-color-scheme:dark){:root{--bg:#15171b;--fg:#e6e8ec;--soft:#a2a9b8;--line:#3a3f4a;--mark:#1f3350;\
--c0:#72b1ff;--c1:#ff9d66;--c2:#5fd6b0;--c3:#cf9bff;--c4:#ff8ab5;--c5:#d6d65c;--c6:#5fd3ea;--c7:#d3b8a0}}\
body{margin:0 auto;padding:1.5rem;max-width:64rem;background:var(--bg);color:var(--fg);\
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.6rem}h2{margin-top:2.5rem;font-size:1.25rem}\
p{max-width:48rem}.soft,caption,figcaption{color:var(--soft)}\
.wide{overflow-x:auto}table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}\
caption,figcaption{text-align:left;font-weight:600;padding-bottom:.3rem}\
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right}\
th:first-child,td:first-child,.text td,.text th{text-align:left}thead th{vertical-align:bottom}\
td.best{background:var(--mark);font-weight:600}figure{margin:1.2rem 0}svg{width:100%;height:auto;max-width:46rem}\
svg text{fill:var(--fg);font-size:12px;font-family:inherit}svg .soft{fill:var(--soft)}\
svg .grid{stroke:var(--line)}svg .axis{stroke:var(--soft)}\
.key{display:inline-block;margin-right:1.1rem;white-space:nowrap}.key svg{width:2rem;height:.8rem;margin-right:.35rem}";

/// A page in the making.
#[derive(Debug)]
pub(crate) struct Page {
    html: String,
}

/// A cell of a table.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    text: String,
    best: bool,
}

impl Cell {
    /// Plain.
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), best: false }
    }

    /// Marked as the best of its row if `best`.
    pub(crate) fn marked(text: impl Into<String>, best: bool) -> Self {
        Self { text: text.into(), best }
    }
}

impl Page {
    /// A page with this title and heading.
    pub(crate) fn new(title: &str) -> Self {
        let title = escape(title);
        let html = format!(
            "<!doctype html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
             <title>{title}</title><style>{STYLE}</style></head>\n<body>\n<main>\n<h1>{title}</h1>\n"
        );
        Self { html }
    }

    /// A heading of the second level.
    pub(crate) fn heading(&mut self, text: &str) {
        self.add(format_args!("<h2>{}</h2>", escape(text)));
    }

    /// A paragraph.
    pub(crate) fn paragraph(&mut self, text: &str) {
        self.add(format_args!("<p>{}</p>", escape(text)));
    }

    /// A table with numbers to the right of its first column.
    pub(crate) fn table(&mut self, caption: &str, header: &[&str], rows: &[Vec<Cell>]) {
        self.any_table("", caption, header, rows);
    }

    /// A table of sentences.
    pub(crate) fn text_table(&mut self, caption: &str, header: &[&str], rows: &[Vec<Cell>]) {
        self.any_table(" class=\"text\"", caption, header, rows);
    }

    fn any_table(&mut self, class: &str, caption: &str, header: &[&str], rows: &[Vec<Cell>]) {
        let head: String =
            header.iter().map(|name| format!("<th scope=\"col\">{}</th>", escape(name))).collect();
        self.add(format_args!(
            "<div class=\"wide\"><table{class}><caption>{}</caption><thead><tr>{head}</tr></thead><tbody>",
            escape(caption)
        ));
        for row in rows {
            let cells = row.iter().enumerate().map(|(column, cell)| {
                let text = escape(&cell.text);
                match (column, cell.best) {
                    (0, _) => format!("<th scope=\"row\">{text}</th>"),
                    (_, true) => format!("<td class=\"best\">{text}</td>"),
                    (_, false) => format!("<td>{text}</td>"),
                }
            });
            self.add(format_args!("<tr>{}</tr>", cells.collect::<String>()));
        }
        self.add(format_args!("</tbody></table></div>"));
    }

    /// Markup that is HTML already.
    pub(crate) fn raw(&mut self, html: &str) {
        self.add(format_args!("{html}"));
    }

    fn add(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.html, "{text}");
    }

    /// The whole page.
    pub(crate) fn finish(mut self) -> String {
        self.html.push_str("</main>\n</body>\n</html>\n");
        self.html
    }
}

/// `text` as HTML text or attribute value.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_never_becomes_markup() {
        let mut page = Page::new("<script>a & b</script>");
        page.paragraph("1 < 2");
        page.table("\"cap\"", &["<i>"], &[vec![Cell::new("<b>x</b>"), Cell::marked("y", true)]]);
        let html = page.finish();
        assert!(!html.contains("<script") && !html.contains("<b>") && !html.contains("<i>"), "{html}");
        assert!(html.contains("<title>&lt;script&gt;a &amp; b&lt;/script&gt;</title>"));
        assert!(html.contains("<td class=\"best\">y</td>"));
        assert!(html.ends_with("</html>\n"));
    }
}
