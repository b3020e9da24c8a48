//! Tests of the accountants against reference vectors and closed forms.
//!
//! The vectors, from dp_accounting 0.6.0 and 40-digit arithmetic, are in the folder that `TRIBUTARY_VECTORS` names;
//! a test that needs one says loudly when it skips.

mod distributed;
mod face;
mod pld;
mod rdp;

use std::collections::HashMap;

use crate::privacy::Event;

/// The rows of a reference file, by column.
pub(super) fn vectors(file: &str) -> Option<Vec<HashMap<String, String>>> {
    let Ok(folder) = std::env::var("TRIBUTARY_VECTORS") else {
        eprintln!("SKIPPED: TRIBUTARY_VECTORS does not name the folder with {file}");
        return None;
    };
    let text = std::fs::read_to_string(std::path::Path::new(&folder).join(file)).unwrap();
    let mut lines = text.lines();
    let header = split(lines.next().unwrap());
    Some(lines.map(|line| header.iter().cloned().zip(split(line)).collect()).collect())
}

/// The cells of a line; one in double quotes may hold commas.
fn split(line: &str) -> Vec<String> {
    let mut cells = vec![String::new()];
    let mut quoted = false;
    for character in line.chars() {
        match character {
            '"' => quoted = !quoted,
            ',' if !quoted => cells.push(String::new()),
            other => cells.last_mut().unwrap().push(other),
        }
    }
    cells
}

/// The events of a row of heterogeneous parts.
pub(super) fn parts(row: &HashMap<String, String>) -> Vec<Event> {
    let parts: Vec<(f64, f64, f64)> = serde_json::from_str(&row["parts_q_sigma_steps_json"]).unwrap();
    parts.iter().map(|(q, sigma, steps)| Event::gaussian(*q, *sigma, *steps as u64)).collect()
}

/// How many rows of a slow comparison make one test: all with `TRIBUTARY_VECTORS_ALL`, else every fifth.
pub(super) fn thinning() -> usize {
    if std::env::var_os("TRIBUTARY_VECTORS_ALL").is_some() { 1 } else { 5 }
}

pub(super) fn number(row: &HashMap<String, String>, column: &str) -> f64 {
    row[column].parse().unwrap()
}
