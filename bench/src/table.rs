//! A table of figures, as Markdown.

/// Prints rows under a head, columns as wide as their widest cell.
pub fn print(head: &[&str], rows: &[Vec<String>]) {
    let width = |i: usize| rows.iter().map(|r| r[i].len()).chain([head[i].len()]).max().unwrap_or(0);
    let line = |cells: Vec<&str>| {
        let cells: Vec<String> = cells.iter().enumerate().map(|(i, c)| format!("{c:<w$}", w = width(i))).collect();
        println!("| {} |", cells.join(" | "));
    };
    line(head.to_vec());
    println!("|{}|", (0..head.len()).map(|i| "-".repeat(width(i) + 2)).collect::<Vec<_>>().join("|"));
    rows.iter().for_each(|row| line(row.iter().map(String::as_str).collect()));
}
