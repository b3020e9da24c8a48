//! CSV tables with a declared schema: missing values, one-hot columns, sites, per-site standardisation, splits.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::csv::{ReaderBuilder, StringRecord, Trim};
use serde::Deserialize;
use tributary_common::ids::NodeName;

use super::config::config as config_error;
use super::images::out_of_range;
use super::{
    BinaryRule, DataConfig, DataError, Dataset, EXAMPLES, Groups, HashedSplit, LabelRule, MissingRows,
    OneHot, Positive, Site, Sites, Split, SplitRule, Standardise, TEXT_FILE_BYTES, VALUES, classes, file,
    open, record,
};

/// Most columns of a table.
const COLUMNS: usize = 65_536;
/// Most characters of a cell that an error repeats.
const SHOWN: usize = 40;
/// Added to a site's standard deviation, so that a constant column becomes zeros and not NaN (FLamby's constant).
const DEVIATION_FLOOR: f64 = 1e-9;

/// Loads the table or tables at `location`: a file, or with `sites` as files the folder that holds them.
pub(super) fn load(config: &DataConfig, location: &Path) -> Result<Dataset, DataError> {
    let (folder, inputs): (PathBuf, Vec<(Option<NodeName>, PathBuf)>) = match &config.sites {
        Some(Sites::Files(files)) => {
            let chosen =
                files.iter().filter(|(name, _)| config.site.as_ref().is_none_or(|site| site == *name));
            let inputs = chosen.map(|(name, file)| (Some(name.clone()), location.join(file))).collect();
            (location.to_path_buf(), inputs)
        }
        _ => {
            let folder = location.parent().unwrap_or(Path::new("")).to_path_buf();
            (folder, vec![(None, location.to_path_buf())])
        }
    };
    let split = match &config.split {
        Some(SplitRule::File(name)) => SplitPlan::read(&folder.join(name), config.sites.is_some())?,
        Some(SplitRule::Hashed(rule)) => SplitPlan::hashed(rule),
        None => SplitPlan::None,
    };
    let mut schema: Option<Schema> = None;
    let mut tables = Vec::new();
    for (site, path) in inputs {
        let (opened, length) = open(&path)?;
        if length > TEXT_FILE_BYTES {
            return Err(file(&path, format!("is larger than {TEXT_FILE_BYTES} bytes")));
        }
        let (read, found) = read(config, &split, &path, site, opened.take(length))?;
        if schema.as_ref().is_some_and(|first| first.names != read.names) {
            return Err(file(&path, "has other columns than the first site's file"));
        }
        schema = Some(read);
        tables.extend(found);
    }
    tables.sort_by(|a, b| a.site.cmp(&b.site));
    let schema = schema.ok_or_else(|| config_error("sites", "must name at least one site"))?;
    assemble(config, &split, &schema, tables)
}

/// The columns' roles.
struct Schema {
    names: Vec<String>,
    label: usize,
    site: Option<usize>,
    /// The column that names the unit of privacy.
    group: Option<usize>,
    /// The column by which the split tells rows apart, where there are no groups.
    id: Option<usize>,
    /// Columns that become one feature each, in the file's order.
    numeric: Vec<usize>,
    /// Columns that become one feature per category, in the file's order.
    one_hot: Vec<usize>,
    /// What stands in for a missing value, by column.
    constants: BTreeMap<usize, String>,
    /// `label_rule`'s values.
    label_values: Vec<Category>,
}

impl Schema {
    fn new(config: &DataConfig, path: &Path, names: Vec<String>) -> Result<Self, DataError> {
        if names.len() > COLUMNS {
            return Err(file(path, format!("has {} columns; at most {COLUMNS} are possible", names.len())));
        }
        let mut places = BTreeMap::new();
        for (place, name) in names.iter().enumerate() {
            if places.insert(name.as_str(), place).is_some() {
                return Err(file(path, format!("has two columns named \"{}\": rename one", shown(name))));
            }
        }
        let find = |key, name: &str| {
            places.get(name).copied().ok_or_else(|| {
                let known: Vec<&str> = names.iter().take(30).map(String::as_str).collect();
                config_error(
                    key,
                    format!("{} has no column \"{name}\"; it has {}", path.display(), known.join(", ")),
                )
            })
        };
        let label = find("label", config.label.as_deref().unwrap_or_default())?;
        let site = match &config.sites {
            Some(Sites::Column(site)) => Some(find("sites", &site.column)?),
            _ => None,
        };
        let mut used: BTreeSet<usize> = site.into_iter().chain([label]).collect();
        if site == Some(label) {
            return Err(config_error("sites", "the label's column cannot be the site's too"));
        }
        let group = config.group.as_deref().map(|name| find("group", name)).transpose()?;
        if group.is_some_and(|column| !used.insert(column)) {
            return Err(config_error("group", "the label's or the site's column cannot be the group's too"));
        }
        let id = match &config.split {
            Some(SplitRule::Hashed(HashedSplit { id: Some(name), .. })) => Some(find("split", name)?),
            _ => None,
        };
        if id.is_some_and(|column| !used.insert(column)) {
            return Err(config_error("split", "the label's or the site's column cannot be the id too"));
        }
        for name in &config.drop {
            if !used.insert(find("drop", name)?) {
                let problem = format!("column \"{name}\" is the label, site, group or id, or here twice");
                return Err(config_error("drop", problem));
            }
        }
        let hot_names: Vec<&String> = match &config.one_hot {
            None => Vec::new(),
            Some(OneHot::Fitted(columns)) => columns.iter().collect(),
            Some(OneHot::Declared(columns)) => columns.keys().collect(),
        };
        let mut one_hot = BTreeSet::new();
        for name in hot_names {
            let place = find("one_hot", name)?;
            if !used.insert(place) {
                let problem =
                    format!("column \"{name}\" is the label, site, group or id, dropped, or here twice");
                return Err(config_error("one_hot", problem));
            }
            one_hot.insert(place);
        }
        let numeric: Vec<usize> = (0..names.len()).filter(|place| !used.contains(place)).collect();
        if let Some(Standardise::Constants(constants)) = &config.standardise {
            for name in constants.keys() {
                if !numeric.contains(&find("standardise", name)?) {
                    return Err(config_error(
                        "standardise",
                        format!("column \"{name}\" is not a numeric feature"),
                    ));
                }
            }
        }
        let mut constants = BTreeMap::new();
        for (name, value) in &config.missing_value {
            let (column, cell) = (find("missing_value", name)?, value.cell());
            let refuse =
                |problem: &str| config_error("missing_value", format!("column \"{name}\" {problem}"));
            if one_hot.contains(&column) {
                if let Some(OneHot::Declared(columns)) = &config.one_hot
                    && !columns
                        .get(name)
                        .into_iter()
                        .flatten()
                        .any(|known| Category::of(known) == Category::of(&cell))
                {
                    return Err(refuse("needs one of its categories in one_hot"));
                }
            } else if !numeric.contains(&column) {
                return Err(refuse("is not a feature"));
            } else if !cell.parse::<f64>().is_ok_and(|number| (number as f32).is_finite()) {
                return Err(refuse("needs a finite number"));
            }
            constants.insert(column, cell);
        }
        if numeric.is_empty() && one_hot.is_empty() {
            return Err(file(path, "has no feature column besides the label: check `drop` and `delimiter`"));
        }
        let label_values: Vec<Category> = match &config.label_rule {
            Some(LabelRule::Classes(values)) => values.iter().map(|value| Category::of(value)).collect(),
            _ => Vec::new(),
        };
        if label_values.iter().collect::<BTreeSet<_>>().len() != label_values.len() {
            return Err(config_error("label_rule", "lists a value twice"));
        }
        let one_hot = one_hot.into_iter().collect();
        Ok(Self { label, site, group, id, numeric, one_hot, constants, label_values, names })
    }

    fn name(&self, column: usize) -> &str {
        self.names.get(column).map_or("", String::as_str)
    }
}

/// The value of a one-hot or label cell: numbers are equal as numbers, so that `1.0` is `1`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Category {
    /// The bits of an `f64`, turned so that they order as the numbers do.
    Number(u64),
    Text(String),
}

impl Category {
    fn of(cell: &str) -> Self {
        match cell.parse::<f64>() {
            Ok(number) if number.is_finite() => {
                let bits = (number + 0.0).to_bits();
                let sign = 1 << 63;
                Category::Number(if bits & sign == 0 { bits | sign } else { !bits })
            }
            _ => Category::Text(cell.to_owned()),
        }
    }
}

/// The rows of one site, in the file's order.
struct Table {
    site: Option<NodeName>,
    path: PathBuf,
    rows: Vec<Row>,
    /// Row numbers of this site that were left out for a missing value.
    dropped: BTreeSet<u64>,
    /// Rows in the file, of all its sites.
    file_rows: u64,
}

struct Row {
    /// From 0, in the raw file.
    number: u64,
    /// From 1, in the raw file.
    line: u64,
    numeric: Vec<f64>,
    categories: Vec<Category>,
    label: i64,
    /// The group's cell.
    group: Option<Box<str>>,
    /// Whether the hash of the group, the id, or else the content makes it a test row.
    hashed_test: bool,
}

/// Reads one file: its schema, and a table per site in it.
fn read(
    config: &DataConfig,
    split: &SplitPlan,
    path: &Path,
    site: Option<NodeName>,
    content: impl Read,
) -> Result<(Schema, Vec<Table>), DataError> {
    let mut reader = ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .trim(Trim::All)
        .delimiter(config.delimiter.and_then(|d| u8::try_from(d).ok()).unwrap_or(b','))
        .from_reader(content);
    let broken = |cause: ::csv::Error| {
        let line = cause.position().map(|position| position.line());
        match (cause.into_kind(), line) {
            (::csv::ErrorKind::Utf8 { .. }, Some(line)) => {
                record(path, format!("line {line}"), "is not UTF-8 text")
            }
            (::csv::ErrorKind::Io(cause), _) => DataError::Io { path: path.to_path_buf(), cause },
            (other, _) => file(path, format!("is not readable as CSV: {other:?}")),
        }
    };
    let mut cells = StringRecord::new();
    let names = match &config.columns {
        Some(names) => names.clone(),
        None => {
            if !reader.read_record(&mut cells).map_err(broken)? {
                return Err(file(path, "is empty"));
            }
            cells.iter().map(str::to_owned).collect()
        }
    };
    let schema = Schema::new(config, path, names)?;
    let mut tables: BTreeMap<Option<NodeName>, Table> = BTreeMap::new();
    let table = |site: Option<NodeName>| Table {
        site,
        path: path.to_path_buf(),
        rows: Vec::new(),
        dropped: BTreeSet::new(),
        file_rows: 0,
    };
    if schema.site.is_none() {
        tables.insert(site.clone(), table(site.clone()));
    }
    let mut number = 0u64;
    while reader.read_record(&mut cells).map_err(broken)? {
        let line = cells.position().map_or(0, |position| position.line());
        let wrong = |problem: String| record(path, format!("line {line}"), problem);
        if cells.len() != schema.names.len() {
            return Err(wrong(format!(
                "has {} cells, the table has {} columns; check the line, and [data] delimiter",
                cells.len(),
                schema.names.len()
            )));
        }
        if number >= EXAMPLES as u64 {
            return Err(wrong(format!("is beyond the limit of {EXAMPLES} rows")));
        }
        let owner = match schema.site.and_then(|column| cells.get(column)) {
            None => site.clone(),
            Some(cell) => Some(cell.parse::<NodeName>().map_err(|error| wrong(format!("site: {error}")))?),
        };
        if config.site.is_none() || owner == config.site {
            let table = tables.entry(owner.clone()).or_insert_with(|| table(owner));
            match parse(config, &schema, split, &cells).map_err(wrong)? {
                Some(row) => table.rows.push(Row { number, line, ..row }),
                None => {
                    table.dropped.insert(number);
                }
            }
        }
        number += 1;
    }
    if number == 0 {
        return Err(file(path, "is empty: it has no row"));
    }
    if let (Some(_), Some(site)) = (schema.site, &config.site)
        && tables.is_empty()
    {
        return Err(config_error("site", format!("{} has no row of site \"{site}\"", path.display())));
    }
    let mut found: Vec<Table> = tables.into_values().collect();
    for table in &mut found {
        table.file_rows = number;
    }
    Ok((schema, found))
}

/// Reads one row; `None` if it lacks a value and such rows are dropped. The error is what is wrong with it.
fn parse(
    config: &DataConfig,
    schema: &Schema,
    split: &SplitPlan,
    cells: &StringRecord,
) -> Result<Option<Row>, String> {
    let missing =
        |cell: &str| cell.is_empty() || config.missing.as_deref().is_some_and(|mark| mark.trim() == cell);
    // A missing value is its column's constant, if there is one.
    let cell = |column: usize| {
        let cell = cells.get(column).unwrap_or_default();
        schema.constants.get(&column).map(String::as_str).filter(|_| missing(cell)).unwrap_or(cell)
    };
    let others = [Some(&schema.label), schema.group.as_ref(), schema.id.as_ref()].into_iter().flatten();
    let mut kept = schema.numeric.iter().chain(&schema.one_hot).chain(others).copied();
    if let Some(column) = kept.find(|column| !schema.constants.contains_key(column) && missing(cell(*column)))
    {
        if config.missing_rows == Some(MissingRows::Drop) {
            return Ok(None);
        }
        return Err(format!(
            "column \"{}\" has no value; set missing_rows = \"drop\", give missing_value, or drop the column",
            shown(schema.name(column))
        ));
    }
    let number = |column: usize| {
        let text = cell(column);
        let finite = |number: &f64| number.is_finite() && (*number as f32).is_finite();
        match text.parse::<f64>() {
            Ok(number) if finite(&number) => Ok(number),
            Ok(_) => Err(format!(
                "column \"{}\" holds \"{}\", not a finite 32-bit number; correct or remove the row",
                shown(schema.name(column)),
                shown(text)
            )),
            Err(_) => Err(format!(
                "column \"{}\" holds \"{}\", not a number; use missing, one_hot or drop for it",
                shown(schema.name(column)),
                shown(text)
            )),
        }
    };
    let label = match &config.label_rule {
        Some(LabelRule::Classes(_)) => {
            let value = Category::of(cell(schema.label));
            let place = schema.label_values.iter().position(|known| *known == value);
            let place = place.ok_or_else(|| {
                format!(
                    "label \"{}\" is not in label_rule; add it, or correct the row",
                    shown(cell(schema.label))
                )
            })?;
            place as i64
        }
        Some(LabelRule::Binary(BinaryRule { positive: Positive::Nonzero })) => {
            i64::from(number(schema.label)? != 0.0)
        }
        None => {
            let value = number(schema.label)?;
            let classes = config.classes.unwrap_or(tributary_common::limits::CLASSES);
            if value.fract() != 0.0 {
                return Err(format!("label {value} is not a whole number; give label_rule"));
            }
            // The cast saturates, and a saturated number is no class.
            let label = value as i64;
            if !usize::try_from(label).is_ok_and(|label| label < classes) {
                return Err(format!("label {}", out_of_range(label, classes)));
            }
            label
        }
    };
    Ok(Some(Row {
        number: 0,
        line: 0,
        numeric: schema.numeric.iter().map(|column| number(*column)).collect::<Result<_, _>>()?,
        categories: schema.one_hot.iter().map(|column| Category::of(cell(*column))).collect(),
        label,
        group: schema.group.map(|column| cell(column).into()),
        hashed_test: split.holds_out(cells, schema.group.or(schema.id).map(cell)),
    }))
}

/// Which rows are test rows.
enum SplitPlan {
    None,
    File { path: PathBuf, sites: BTreeMap<Option<String>, Halves> },
    Hashed { by_content: [u8; 32], by_id: [u8; 32], fraction: f64 },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Halves {
    train: Vec<u64>,
    test: Vec<u64>,
}

impl SplitPlan {
    fn hashed(rule: &HashedSplit) -> Self {
        let key = |context| blake3::derive_key(context, rule.key.as_bytes());
        SplitPlan::Hashed {
            by_content: key("tributary 2026 test split by content v1"),
            by_id: key("tributary 2026 test split by id v1"),
            fraction: rule.test_fraction,
        }
    }

    fn read(path: &Path, by_site: bool) -> Result<Self, DataError> {
        let (opened, length) = open(path)?;
        let mut text = String::new();
        opened
            .take(TEXT_FILE_BYTES.min(length))
            .read_to_string(&mut text)
            .map_err(|cause| DataError::Io { path: path.to_path_buf(), cause })?;
        Self::parse(path, &text, by_site)
    }

    fn parse(path: &Path, text: &str, by_site: bool) -> Result<Self, DataError> {
        let sites = if by_site {
            serde_json::from_str::<BTreeMap<String, Halves>>(text)
                .map(|sites| sites.into_iter().map(|(name, halves)| (Some(name), halves)).collect())
        } else {
            serde_json::from_str::<Halves>(text).map(|halves| BTreeMap::from([(None, halves)]))
        };
        let form = if by_site {
            "{\"SITE\": {\"train\": [rows], \"test\": [rows]}, …}"
        } else {
            "{\"train\": [rows], \"test\": [rows]}"
        };
        let sites =
            sites.map_err(|error| file(path, format!("is not a split file: {error}; it holds {form}")))?;
        Ok(SplitPlan::File { path: path.to_path_buf(), sites })
    }

    /// The hash's word on a row: its group or id alone decides, or else its content, where every cell counts.
    fn holds_out(&self, cells: &StringRecord, id: Option<&str>) -> bool {
        let SplitPlan::Hashed { by_content, by_id, fraction } = self else { return false };
        let mut hasher = blake3::Hasher::new_keyed(if id.is_some() { by_id } else { by_content });
        let mut add = |cell: &str| {
            hasher.update(&(cell.len() as u64).to_le_bytes());
            hasher.update(cell.as_bytes());
        };
        match id {
            Some(id) => add(id),
            None => cells.iter().for_each(add),
        }
        let mut word = [0; 8];
        hasher.finalize_xof().fill(&mut word);
        // 53 bits, so that the quotient is exact.
        ((u64::from_le_bytes(word) >> 11) as f64 / (1u64 << 53) as f64) < *fraction
    }

    /// The training and test rows of a table, each in the file's order.
    fn halves<'a>(&self, table: &'a Table) -> Result<(Vec<&'a Row>, Vec<&'a Row>), DataError> {
        let (path, sites) = match self {
            SplitPlan::None => return Ok((table.rows.iter().collect(), Vec::new())),
            SplitPlan::Hashed { .. } => {
                let (test, train) = table.rows.iter().partition(|row| row.hashed_test);
                return Ok((train, test));
            }
            SplitPlan::File { path, sites } => (path, sites),
        };
        let name = table.site.as_ref().map(|site| site.as_str().to_owned());
        let at = |number: &u64| match &name {
            Some(name) => format!("site {name}, row {number}"),
            None => format!("row {number}"),
        };
        let halves = sites.get(&name).ok_or_else(|| {
            file(path, format!("has no site \"{}\": add its rows", name.as_deref().unwrap_or_default()))
        })?;
        let rows: BTreeMap<u64, &Row> = table.rows.iter().map(|row| (row.number, row)).collect();
        let mut seen = BTreeSet::new();
        let mut pick = |numbers: &[u64]| {
            let mut picked = Vec::new();
            for number in numbers {
                if !seen.insert(*number) {
                    return Err(record(path, at(number), "is listed twice: keep it in one half"));
                }
                let data = table.path.display();
                picked.push(*rows.get(number).ok_or_else(|| {
                    let problem = if *number >= table.file_rows {
                        format!("is out of range: {data} has rows 0 to {}", table.file_rows.saturating_sub(1))
                    } else if table.dropped.contains(number) {
                        format!("lacks a value in {data} and was left out: take it out of the split")
                    } else {
                        format!("belongs to another site in {data}")
                    };
                    record(path, at(number), problem)
                })?);
            }
            picked.sort_by_key(|row| row.number);
            Ok(picked)
        };
        Ok((pick(&halves.train)?, pick(&halves.test)?))
    }
}

/// Splits, encodes and standardises the tables, one after another.
fn assemble(
    config: &DataConfig,
    plan: &SplitPlan,
    schema: &Schema,
    tables: Vec<Table>,
) -> Result<Dataset, DataError> {
    let encoder = Encoder::new(config, schema, &tables)?;
    let examples: usize = tables.iter().map(|table| table.rows.len()).sum();
    if examples.saturating_mul(encoder.width) > VALUES {
        return Err(config_error("path", format!("the tables hold more than {VALUES} values")));
    }
    let mut train = Split::default();
    let mut test = Split::default();
    let mut sites = Vec::new();
    // Groups of one name at two sites are two groups.
    let (mut train_groups, mut test_groups) = (Groups::default(), Groups::default());
    for (place, table) in tables.iter().enumerate() {
        let (train_rows, test_rows) = plan.halves(table)?;
        together(table, &train_rows, &test_rows)?;
        if train_rows.is_empty() {
            let site = table.site.as_ref().map(|site| format!("site {site}: ")).unwrap_or_default();
            return Err(file(
                &table.path,
                format!("{site}no training row is left: check `split` and `missing_rows`"),
            ));
        }
        let train_features = encoder.rows(table, &train_rows);
        let scale = encoder.scale(config, table, &train_features)?;
        let test_features = encoder.rows(table, &test_rows);
        let (train_start, test_start) = (train.len(), test.len());
        for (half, groups, rows, features) in [
            (&mut train, &mut train_groups, &train_rows, train_features),
            (&mut test, &mut test_groups, &test_rows, test_features),
        ] {
            for (row, values) in rows.iter().zip(features.chunks(encoder.width.max(1))) {
                for (value, (mean, deviation)) in values.iter().zip(&scale) {
                    let value = ((value - mean) / deviation) as f32;
                    if !value.is_finite() {
                        let problem = "is not finite once standardised; check its values and the constants";
                        return Err(record(&table.path, format!("line {}", row.line), problem));
                    }
                    half.features.push(value);
                }
                half.labels.push(row.label);
                half.groups.extend(row.group.as_deref().map(|group| groups.id((place, group))));
            }
        }
        if let Some(name) = &table.site {
            let (train, test) = (train_start..train.len(), test_start..test.len());
            sites.push(Site { name: name.clone(), train, test });
        }
    }
    let declared = match &config.label_rule {
        Some(LabelRule::Classes(values)) => Some(values.len()),
        Some(LabelRule::Binary(_)) => Some(2),
        None => config.classes,
    };
    Ok(Dataset {
        example_shape: vec![encoder.width],
        classes: classes(declared, [&train, &test]),
        train: Arc::new(train),
        test: Arc::new(test),
        sites: config.sites.is_some().then_some(sites),
    })
}

/// Refuses a split that tears a group apart.
fn together(table: &Table, train: &[&Row], test: &[&Row]) -> Result<(), DataError> {
    let trained: BTreeSet<&str> = train.iter().filter_map(|row| row.group.as_deref()).collect();
    match test.iter().find(|row| row.group.as_deref().is_some_and(|group| trained.contains(group))) {
        None => Ok(()),
        Some(row) => {
            let group = shown(row.group.as_deref().unwrap_or_default());
            let problem = format!(
                "is a test row, but other rows of its group \"{group}\" are for training: keep a group in one half"
            );
            Err(record(&table.path, format!("line {}", row.line), problem))
        }
    }
}

/// From rows to feature vectors.
struct Encoder<'a> {
    schema: &'a Schema,
    /// Per one-hot column: its categories in feature order.
    categories: Vec<Vec<Category>>,
    /// Categories per column without a feature of their own: 0, or 1 with `drop_first`.
    skipped: usize,
    /// Features per row.
    width: usize,
}

impl<'a> Encoder<'a> {
    fn new(config: &DataConfig, schema: &'a Schema, tables: &[Table]) -> Result<Self, DataError> {
        let mut categories = Vec::new();
        for (place, column) in schema.one_hot.iter().enumerate() {
            let name = schema.name(*column);
            let found: Vec<Category> = match &config.one_hot {
                Some(OneHot::Declared(columns)) => {
                    columns.get(name).into_iter().flatten().map(|value| Category::of(value)).collect()
                }
                _ => {
                    let rows = tables.iter().flat_map(|table| &table.rows);
                    let all: BTreeSet<&Category> = rows.filter_map(|row| row.categories.get(place)).collect();
                    all.into_iter().cloned().collect()
                }
            };
            if found.iter().collect::<BTreeSet<_>>().len() != found.len() {
                return Err(config_error("one_hot", format!("column \"{name}\" lists a category twice")));
            }
            if found.len() > COLUMNS {
                let problem = format!("column \"{name}\" has {} categories; at most {COLUMNS}", found.len());
                return Err(config_error("one_hot", problem));
            }
            categories.push(found);
        }
        let skipped = usize::from(config.drop_first.unwrap_or(false));
        let hot: usize = categories.iter().map(|found| found.len().saturating_sub(skipped)).sum();
        let width = schema.numeric.len() + hot;
        if width == 0 {
            return Err(config_error(
                "one_hot",
                "no feature is left: each column has one category, and it is dropped",
            ));
        }
        Ok(Self { schema, categories, skipped, width })
    }

    /// The rows' features, rows × width. A value that is no category of its column has zeros there, so that one
    /// row of a kind never seen before stops nobody; the log counts them.
    fn rows(&self, table: &Table, rows: &[&Row]) -> Vec<f64> {
        let mut unknown = vec![0usize; self.categories.len()];
        let mut features = Vec::with_capacity(rows.len().saturating_mul(self.width));
        for row in rows {
            features.extend(&row.numeric);
            for ((value, known), unknown) in row.categories.iter().zip(&self.categories).zip(&mut unknown) {
                let place = known.iter().position(|category| category == value);
                *unknown += usize::from(place.is_none());
                features.extend((self.skipped..known.len()).map(|k| f64::from(u8::from(Some(k) == place))));
            }
        }
        for (column, rows) in self.schema.one_hot.iter().zip(unknown).filter(|(_, rows)| *rows > 0) {
            tracing::warn!(
                "{}: {rows} rows have a value of column \"{}\" that one_hot does not list: they have no category there",
                table.path.display(),
                shown(self.schema.name(*column)),
            );
        }
        features
    }

    /// What each feature is lessened and then divided by.
    fn scale(&self, config: &DataConfig, table: &Table, train: &[f64]) -> Result<Vec<(f64, f64)>, DataError> {
        match &config.standardise {
            None | Some(Standardise::PerSite(false)) => Ok(vec![(0.0, 1.0); self.width]),
            Some(Standardise::Constants(constants)) => {
                let numeric =
                    self.schema.numeric.iter().map(|column| constants.get(self.schema.name(*column)));
                let constant = |found: Option<&[f64; 2]>| {
                    found.map_or((0.0, 1.0), |[mean, deviation]| (*mean, *deviation))
                };
                let mut scale: Vec<(f64, f64)> = numeric.map(constant).collect();
                scale.resize(self.width, (0.0, 1.0));
                Ok(scale)
            }
            Some(Standardise::PerSite(true)) => {
                let rows = train.len() / self.width.max(1);
                if rows < 2 {
                    let problem =
                        "has one training row, too few to standardise; give standardise as constants";
                    return Err(file(&table.path, problem));
                }
                let column = |feature: usize| train.iter().skip(feature).step_by(self.width.max(1));
                let moments = |feature| {
                    let mean = column(feature).sum::<f64>() / rows as f64;
                    let squares: f64 = column(feature).map(|x| (x - mean) * (x - mean)).sum();
                    (mean, (squares / (rows - 1) as f64).sqrt() + DEVIATION_FLOOR)
                };
                Ok((0..self.width).map(moments).collect())
            }
        }
    }
}

/// A cell or name for an error line: short, and without control characters.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(SHOWN).collect()
}

/// Reads one table from memory, as [`load`] reads a file.
#[cfg(test)]
pub(super) fn from_bytes(config: &DataConfig, bytes: &[u8]) -> Result<Dataset, DataError> {
    let path = Path::new("table.csv");
    let split = match &config.split {
        Some(SplitRule::Hashed(rule)) => SplitPlan::hashed(rule),
        _ => SplitPlan::None,
    };
    let (schema, tables) = read(config, &split, path, None, bytes)?;
    assemble(config, &split, &schema, tables)
}

/// Whether a split file can be read: for the property test.
#[cfg(test)]
pub(super) fn split_from_text(text: &str, by_site: bool) -> Result<(), DataError> {
    SplitPlan::parse(Path::new("split.json"), text, by_site).map(|_| ())
}
