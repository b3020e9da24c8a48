//! TOML documents that people write: overrides from the command line, unknown keys named with the nearest known one.

use toml::{Table, Value};

/// Why a document is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// The text is not TOML.
    #[error("not TOML: {0}")]
    Syntax(String),
    /// A key that nobody reads.
    #[error("unknown key `{key}`{}", hint(.nearest))]
    UnknownKey {
        /// The key with the tables around it.
        key: String,
        /// The nearest known key in the same table.
        nearest: Option<String>,
    },
    /// A value has the wrong type, or a required key is missing.
    #[error("{0}")]
    Value(String),
    /// An override is not `key=value`.
    #[error("override {0:?} is not `key=value`, such as `train.learning_rate=0.1`")]
    Override(String),
}

fn hint(nearest: &Option<String>) -> String {
    nearest.as_ref().map(|key| format!("; did you mean `{key}`?")).unwrap_or_default()
}

/// The keys that a table may have, and the tables below it.
#[derive(Debug, Clone, Copy)]
pub struct Schema {
    /// Keys with plain values.
    pub keys: &'static [&'static str],
    /// Keys that hold tables, each with its own schema; `None` leaves a table's keys to its reader.
    pub tables: &'static [(&'static str, Option<&'static Schema>)],
}

/// Parses `text` as TOML; the error names line and column.
pub fn parse(text: &str) -> Result<Table, DocumentError> {
    text.parse::<Table>().map_err(|error| {
        let at = error.span().map(|span| {
            let before = text.get(..span.start).unwrap_or(text);
            let line = before.matches('\n').count() + 1;
            let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
            format!("line {line}, column {column}: ")
        });
        DocumentError::Syntax(format!("{}{}", at.unwrap_or_default(), error.message().replace('\n', " ")))
    })
}

/// Applies one `a.b.c=value` override. The value is read as TOML, else taken as a string.
pub fn set(table: &mut Table, assignment: &str) -> Result<(), DocumentError> {
    let wrong = || DocumentError::Override(assignment.chars().take(200).collect());
    let (path, text) = assignment.split_once('=').ok_or_else(wrong)?;
    let mut steps: Vec<&str> = path.trim().split('.').collect();
    let last = steps.pop().filter(|key| !key.is_empty()).ok_or_else(wrong)?;
    let value = format!("value = {text}")
        .parse::<Table>()
        .ok()
        .filter(|parsed| parsed.len() == 1)
        .and_then(|mut parsed| parsed.remove("value"))
        .unwrap_or_else(|| Value::String(text.trim().to_owned()));
    let mut here = table;
    for step in steps {
        if step.is_empty() {
            return Err(wrong());
        }
        let next = here.entry(step).or_insert_with(|| Value::Table(Table::new()));
        here = next.as_table_mut().ok_or_else(wrong)?;
    }
    here.insert(last.to_owned(), value);
    Ok(())
}

/// Refuses the first key of `table` that `schema` does not know.
pub fn check_keys(table: &Table, schema: &Schema) -> Result<(), DocumentError> {
    check_below(table, schema, "")
}

fn check_below(table: &Table, schema: &Schema, prefix: &str) -> Result<(), DocumentError> {
    for (key, value) in table {
        let below = schema.tables.iter().find(|(name, _)| name == key);
        match below {
            Some((_, Some(inner))) => {
                let name = format!("{prefix}{key}");
                let inner_table = value.as_table().ok_or_else(|| {
                    DocumentError::Value(format!("`{name}` must be a table: write [{name}]"))
                })?;
                check_below(inner_table, inner, &format!("{name}."))?;
            }
            Some((_, None)) => {}
            None if schema.keys.contains(&key.as_str()) => {}
            None => {
                let known = schema.keys.iter().chain(schema.tables.iter().map(|(name, _)| name)).copied();
                let nearest = nearest(key, known).map(|name| format!("{prefix}{name}"));
                return Err(DocumentError::UnknownKey { key: format!("{prefix}{key}"), nearest });
            }
        }
    }
    Ok(())
}

/// The known name that `key` is most likely meant to be, if any is near.
pub fn nearest<'a>(key: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|name| (strsim::jaro_winkler(key, name), name))
        .filter(|(score, _)| *score > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

/// Reads a checked table into a typed value; the error is one line.
pub fn read<T: serde::de::DeserializeOwned>(table: Table) -> Result<T, DocumentError> {
    T::deserialize(table)
        .map_err(|error| DocumentError::Value(error.to_string().trim_end().replace('\n', " ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRAIN: Schema = Schema { keys: &["learning_rate", "momentum"], tables: &[] };
    const ROOT: Schema = Schema { keys: &["name"], tables: &[("train", Some(&TRAIN)), ("data", None)] };

    #[test]
    fn an_unknown_key_is_named_with_the_nearest_known_one() {
        let check = |text: &str| check_keys(&parse(text).unwrap(), &ROOT).map_err(|e| e.to_string());
        assert_eq!(check("name = 'a'\n[train]\nmomentum = 1\n[data]\nanything = 1"), Ok(()));
        assert_eq!(
            check("[train]\nlearning_rte = 1").unwrap_err(),
            "unknown key `train.learning_rte`; did you mean `train.learning_rate`?"
        );
        assert_eq!(check("[trian]").unwrap_err(), "unknown key `trian`; did you mean `train`?");
        assert_eq!(check("zzz = 1").unwrap_err(), "unknown key `zzz`");
        assert_eq!(check("train = 1").unwrap_err(), "`train` must be a table: write [train]");
    }

    #[test]
    fn overrides_reach_into_tables() {
        let mut table = parse("[train]\nlearning_rate = 1.0").unwrap();
        for assignment in
            ["train.learning_rate=0.5", "model.inputs=[1, 2]", "name=heart disease", "train.x=true"]
        {
            set(&mut table, assignment).unwrap();
        }
        let expected =
            "name = 'heart disease'\n[train]\nlearning_rate = 0.5\nx = true\n[model]\ninputs = [1, 2]";
        assert_eq!(table, parse(expected).unwrap());
        for bad in ["", "x", "=1", "a..b=1", ".a=1", "name.x=1"] {
            assert!(set(&mut table, bad).is_err(), "{bad}");
        }
        set(&mut table, "name=1\nseed=2").unwrap();
        assert_eq!(table["name"].as_str(), Some("1\nseed=2"));
    }

    #[test]
    fn a_syntax_error_says_where() {
        assert!(parse("a = 1\nb = = 2").unwrap_err().to_string().starts_with("not TOML: line 2, column "));
    }
}
