//! Columns of text, as Go's tabwriter sets them for kubectl: three blanks between, six wide at least, the last not padded.

use serde_json::Value;

use crate::objects::{items, text};

const PADDING: usize = 3;
const CELL_WIDTH_MIN: usize = 6;

/// Widths that only grow, so that the rows of a watch stay below their headings.
#[derive(Debug, Default)]
pub(crate) struct Widths(Vec<usize>);

impl Widths {
    /// Sets rows, each ending in a line break.
    pub(crate) fn render(&mut self, rows: &[Vec<String>]) -> String {
        for row in rows {
            for (column, cell) in row.iter().enumerate() {
                let width = (cell.chars().count() + PADDING).max(CELL_WIDTH_MIN);
                match self.0.get_mut(column) {
                    Some(known) => *known = width.max(*known),
                    None => self.0.push(width),
                }
            }
        }
        let mut set = String::new();
        for row in rows {
            for (column, cell) in row.iter().enumerate() {
                set.push_str(cell);
                if column + 1 < row.len() {
                    let width = self.0.get(column).copied().unwrap_or_default();
                    set.extend(std::iter::repeat_n(' ', width.saturating_sub(cell.chars().count())));
                }
            }
            set.push('\n');
        }
        set
    }
}

/// Sets one table.
pub(crate) fn render(rows: &[Vec<String>]) -> String {
    Widths::default().render(rows)
}

/// What of a server's table is shown.
#[derive(Debug, Clone, Default)]
pub(crate) struct TableOptions {
    pub(crate) wide: bool,
    pub(crate) with_namespace: bool,
    pub(crate) show_labels: bool,
    pub(crate) show_kind: bool,
    pub(crate) label_columns: Vec<String>,
}

/// The headings of a server's table.
pub(crate) fn headings(table: &Value, options: &TableOptions) -> Vec<String> {
    let shown = shown_columns(table, options);
    let mut headings: Vec<String> = if options.with_namespace { vec!["NAMESPACE".to_owned()] } else { Vec::new() };
    headings.extend(shown.iter().map(|(_, name)| name.to_uppercase()));
    for label in &options.label_columns {
        headings.push(label.rsplit('/').next().unwrap_or(label).to_uppercase());
    }
    if options.show_labels {
        headings.push("LABELS".to_owned());
    }
    headings
}

/// The rows of a server's table; `reference` is what goes before the name if kinds are shown (`pod/`).
pub(crate) fn rows(table: &Value, options: &TableOptions, reference: &str) -> Vec<Vec<String>> {
    let shown = shown_columns(table, options);
    let one = |row: &Value| {
        let mut cells: Vec<String> = Vec::new();
        if options.with_namespace {
            cells.push(text(row, "/object/metadata/namespace").to_owned());
        }
        for (position, (column, _)) in shown.iter().enumerate() {
            let cell = row["cells"].get(*column).map(super::jsonpath::plain).unwrap_or_default();
            let cell = cell.lines().next().unwrap_or_default().to_owned();
            let is_name = position == 0 && options.show_kind && !reference.is_empty();
            cells.push(if is_name { format!("{reference}/{cell}") } else { cell });
        }
        let labels = row.pointer("/object/metadata/labels");
        for label in &options.label_columns {
            let value = labels.and_then(|labels| labels.get(label)).and_then(Value::as_str);
            cells.push(value.unwrap_or_default().to_owned());
        }
        if options.show_labels {
            cells.push(labels_text(labels));
        }
        cells
    };
    items(table, "/rows").iter().map(one).collect()
}

/// The places and names of the columns that are shown.
fn shown_columns<'a>(table: &'a Value, options: &TableOptions) -> Vec<(usize, &'a str)> {
    items(table, "/columnDefinitions")
        .iter()
        .enumerate()
        .filter(|(_, column)| options.wide || column["priority"].as_i64().unwrap_or(0) == 0)
        .map(|(place, column)| (place, column["name"].as_str().unwrap_or_default()))
        .collect()
}

/// `a=b,c=d`, or `<none>`.
pub(crate) fn labels_text(labels: Option<&Value>) -> String {
    let text = crate::objects::selector_text(labels);
    if text.is_empty() { "<none>".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn table() -> Value {
        json!({
            "kind": "Table",
            "columnDefinitions": [
                {"name": "Name", "priority": 0}, {"name": "Ready", "priority": 0}, {"name": "Node", "priority": 1}],
            "rows": [
                {"cells": ["a", "1/1", "n1"], "object": {"metadata": {"name": "a", "namespace": "x", "labels": {"app": "web", "t": "1"}}}},
                {"cells": ["long-name", "0/1", null], "object": {"metadata": {"name": "long-name", "namespace": "default"}}},
            ]
        })
    }

    fn set(options: &TableOptions, reference: &str) -> String {
        let mut all = vec![headings(&table(), options)];
        all.extend(rows(&table(), options, reference));
        render(&all)
    }

    #[test]
    fn tables_are_set_as_kubectl_does() {
        assert_eq!(set(&TableOptions::default(), ""), "NAME        READY\na           1/1\nlong-name   0/1\n");
        assert_eq!(
            set(&TableOptions { wide: true, with_namespace: true, ..TableOptions::default() }, ""),
            "NAMESPACE   NAME        READY   NODE\nx           a           1/1     n1\ndefault     long-name   0/1     \n"
        );
        assert_eq!(
            set(&TableOptions { show_labels: true, ..TableOptions::default() }, ""),
            "NAME        READY   LABELS\na           1/1     app=web,t=1\nlong-name   0/1     <none>\n"
        );
        assert_eq!(
            set(
                &TableOptions {
                    show_kind: true,
                    label_columns: vec!["x.io/app".into(), "app".into()],
                    ..TableOptions::default()
                },
                "pod"
            ),
            "NAME            READY   APP   APP\npod/a           1/1           web\npod/long-name   0/1           \n"
        );
    }

    #[test]
    fn widths_only_grow() {
        let mut widths = Widths::default();
        widths.render(&[vec!["NAME".into(), "X".into()], vec!["a-long-name".into(), "1".into()]]);
        assert_eq!(widths.render(&[vec!["b".into(), "2".into()]]), "b             2\n");
    }
}
