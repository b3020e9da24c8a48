//! Layers as a job file writes them, for the architecture `sequential`: what they mean is found by position.

use serde::{Deserialize, Serialize};
use toml::Value;

use super::architecture::ArchitectureError;
use super::network::{Layer, at, below};
use crate::document::{self, Schema};
use crate::limits::{LAYERS, LIST_LAYERS, RESIDUAL_DEPTH};

/// One layer of a job: a [`Layer`] without its name and without what follows from the layer before it.
///
/// In TOML a name such as `"relu"`, or a table with one key such as `{ linear = 200 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LayerSpec {
    /// [`Layer::Flatten`].
    Flatten,
    /// [`Layer::Linear`] with so many outputs.
    Linear(usize),
    /// [`Layer::Convolution`].
    Convolution {
        /// Channels out.
        channels: usize,
        /// Side of the square window.
        size: usize,
        /// Step of the window, 1 unless given.
        #[serde(default = "one")]
        stride: usize,
        /// Zeros added on each side, 0 unless given.
        #[serde(default)]
        padding: usize,
    },
    /// [`Layer::GroupNorm`].
    GroupNorm {
        /// Groups; a divisor of the channels.
        groups: usize,
    },
    /// [`Layer::LayerNorm`].
    #[serde(rename = "layer-norm")]
    LayerNorm,
    /// [`Layer::Embedding`].
    Embedding {
        /// How many different numbers there are.
        vocabulary: usize,
        /// Values that stand for a number.
        width: usize,
    },
    /// [`Layer::Relu`].
    Relu,
    /// [`Layer::Tanh`].
    Tanh,
    /// [`Layer::MaxPool`].
    MaxPool {
        /// Side of the window.
        size: usize,
        /// Step of the window.
        stride: usize,
    },
    /// [`Layer::AveragePool`].
    AveragePool {
        /// Side of the window.
        size: usize,
        /// Step of the window.
        stride: usize,
    },
    /// [`Layer::GlobalAveragePool`].
    #[serde(rename = "global-average-pool")]
    GlobalAveragePool,
    /// [`Layer::Dropout`] with this probability.
    Dropout(f64),
    /// [`Layer::Residual`].
    Residual {
        /// The layers of one branch.
        body: Vec<LayerSpec>,
        /// The layers of the other; none is the identity.
        #[serde(default)]
        shortcut: Vec<LayerSpec>,
    },
}

fn one() -> usize {
    1
}

/// Layers that are written as a name.
const NAMES: [&str; 5] = ["flatten", "layer-norm", "relu", "tanh", "global-average-pool"];
/// Layers that are written as a table with one key, and the keys below it, if it holds a table.
const TABLES: [(&str, Option<Schema>); 8] = [
    ("linear", None),
    ("convolution", Some(Schema { keys: &["channels", "size", "stride", "padding"], tables: &[] })),
    ("group_norm", Some(Schema { keys: &["groups"], tables: &[] })),
    ("embedding", Some(Schema { keys: &["vocabulary", "width"], tables: &[] })),
    ("max_pool", Some(Schema { keys: &["size", "stride"], tables: &[] })),
    ("average_pool", Some(Schema { keys: &["size", "stride"], tables: &[] })),
    ("dropout", None),
    ("residual", Some(Schema { keys: &["body", "shortcut"], tables: &[] })),
];

/// Checks that `layers`, a value in a job file, reads as a list of [`LayerSpec`]: serde would not say where it does
/// not.
pub(crate) fn check(layers: &Value) -> Result<(), ArchitectureError> {
    let mut left = LAYERS;
    check_list(layers, &mut left, RESIDUAL_DEPTH, "", &at)
}

/// Checks one list; `left` layers may still come, in residual layers `depth` deep.
fn check_list(
    list: &Value,
    left: &mut usize,
    depth: usize,
    whose: &str,
    position: &dyn Fn(usize) -> String,
) -> Result<(), ArchitectureError> {
    let wrong = |what: String| Err(ArchitectureError::Layers(format!("{whose}{what}")));
    let Some(list) = list.as_array() else {
        return wrong("a list is needed, such as [\"flatten\", { linear = 10 }]".into());
    };
    if list.len() > LIST_LAYERS {
        return wrong(format!("{} in one list; at most {LIST_LAYERS} are possible", list.len()));
    }
    for (index, value) in list.iter().enumerate() {
        let position = position(index);
        *left = left.checked_sub(1).ok_or_else(|| {
            ArchitectureError::Layers(format!("more than {LAYERS} in all, residual branches included"))
        })?;
        check_one(value, left, depth, &position)?;
    }
    Ok(())
}

fn check_one(value: &Value, left: &mut usize, depth: usize, position: &str) -> Result<(), ArchitectureError> {
    let wrong = |what: String| ArchitectureError::Layers(format!("{position}: {what}"));
    let unknown = |name: &str| {
        if name.replace(['-', '_', ' '], "").eq_ignore_ascii_case("batchnorm") {
            // What one example changes in the others' slopes could not be bounded, with privacy or without.
            return wrong(
                "batch normalisation mixes the examples of a batch: use { group_norm = { groups = … } }"
                    .into(),
            );
        }
        let known = NAMES.into_iter().chain(TABLES.iter().map(|(name, _)| *name));
        let hint = document::nearest(name, known).map(|name| format!("; did you mean `{name}`?"));
        let name: String = name.chars().take(64).collect();
        wrong(format!("unknown layer {name:?}{}", hint.unwrap_or_default()))
    };
    let table = match value {
        Value::String(name) if NAMES.contains(&name.as_str()) => return Ok(()),
        Value::String(name) => {
            return Err(match TABLES.iter().find(|(table, _)| table == name) {
                Some(_) => wrong(format!("\"{name}\" needs a value: write {{ {name} = … }}")),
                None => unknown(name),
            });
        }
        Value::Table(table) => table,
        _ => {
            return Err(wrong(
                "a layer is a name such as \"relu\" or a table such as { linear = 10 }".into(),
            ));
        }
    };
    let mut keys = table.iter();
    let (Some((name, inner)), None) = (keys.next(), keys.next()) else {
        return Err(wrong(format!(
            "a table with one key is needed, such as {{ linear = 10 }}, not {}",
            table.len()
        )));
    };
    if NAMES.contains(&name.as_str()) {
        return Err(wrong(format!("`{name}` takes no value: write \"{name}\"")));
    }
    let Some((kind, schema)) = TABLES.iter().find(|(table, _)| table == name) else {
        return Err(unknown(name));
    };
    let misfit = |misfit: String| ArchitectureError::Layer { position: position.to_owned(), kind, misfit };
    if let Some(schema) = schema {
        let inner = inner.as_table().ok_or_else(|| {
            misfit(format!(
                "a table is needed, such as {{ {kind} = {{ {} = … }} }}",
                schema.keys.join(" = …, ")
            ))
        })?;
        document::check_keys(inner, schema).map_err(|error| misfit(error.to_string()))?;
        if *kind == "residual" {
            let depth = depth.checked_sub(1).ok_or_else(|| {
                misfit(format!("residual layers stand at most {RESIDUAL_DEPTH} deep in each other"))
            })?;
            for branch in ["body", "shortcut"] {
                let Some(list) = inner.get(branch) else { continue };
                let within = |index| below(position, branch, index);
                check_list(list, left, depth, &format!("{position}, {branch}: "), &within)?;
            }
            return match inner.get("body") {
                Some(_) => Ok(()),
                None => Err(misfit("missing field `body`".into())),
            };
        }
    }
    match LayerSpec::deserialize(value.clone()) {
        Ok(_) => Ok(()),
        Err(error) => {
            Err(misfit(error.to_string().lines().next().unwrap_or("not understood").trim_end().to_owned()))
        }
    }
}

/// The layers that `list` means for examples of shape `inputs`, named by their positions: `layer01`, or
/// `layer03.body02` within a residual layer.
pub(super) fn build(list: &[LayerSpec], inputs: &[usize]) -> Result<Vec<Layer>, ArchitectureError> {
    let (layers, _) = branch(list, inputs.to_vec(), "layer", &at)?;
    Ok(layers)
}

/// The layers of one list and the shape that they yield. `name` stands before the numbers.
fn branch(
    list: &[LayerSpec],
    mut shape: Vec<usize>,
    name: &str,
    position: &dyn Fn(usize) -> String,
) -> Result<(Vec<Layer>, Vec<usize>), ArchitectureError> {
    let mut layers = Vec::with_capacity(list.len());
    for (index, spec) in list.iter().enumerate() {
        let (name, position) = (format!("{name}{:02}", index + 1), position(index));
        let layer = spec.layer(name, &shape, &position)?;
        shape = layer.output(&shape, &position)?;
        layers.push(layer);
    }
    Ok((layers, shape))
}

impl LayerSpec {
    fn layer(&self, name: String, shape: &[usize], position: &str) -> Result<Layer, ArchitectureError> {
        // What the layer before yields; a shape that does not suit the layer is refused by `Layer::output`.
        let inputs = shape.first().copied().unwrap_or(0);
        Ok(match *self {
            LayerSpec::Flatten => Layer::Flatten,
            LayerSpec::Linear(outputs) => Layer::Linear { name, inputs, outputs },
            LayerSpec::Convolution { channels, size, stride, padding } => {
                Layer::Convolution { name, inputs, outputs: channels, size, stride, padding }
            }
            LayerSpec::GroupNorm { groups } => Layer::GroupNorm { name, channels: inputs, groups },
            LayerSpec::LayerNorm => Layer::LayerNorm { name, features: inputs },
            LayerSpec::Embedding { vocabulary, width } => Layer::Embedding { name, vocabulary, width },
            LayerSpec::Relu => Layer::Relu,
            LayerSpec::Tanh => Layer::Tanh,
            LayerSpec::MaxPool { size, stride } => Layer::MaxPool { size, stride },
            LayerSpec::AveragePool { size, stride } => Layer::AveragePool { size, stride },
            LayerSpec::GlobalAveragePool => Layer::GlobalAveragePool,
            LayerSpec::Dropout(probability) => Layer::Dropout { probability },
            LayerSpec::Residual { ref body, ref shortcut } => {
                let layers = |list: &[LayerSpec], which: &str| {
                    let within = |index| below(position, which, index);
                    Ok(branch(list, shape.to_vec(), &format!("{name}.{which}"), &within)?.0)
                };
                Layer::Residual { body: layers(body, "body")?, shortcut: layers(shortcut, "shortcut")? }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Architecture;
    use super::*;
    use crate::model::Network;

    /// What a job with these `layers` (a TOML list) is for `inputs` and 10 classes.
    fn network(inputs: &[usize], layers: &str) -> Result<Network, String> {
        let table = document::parse(&format!("layers = {layers}")).unwrap();
        check(&table["layers"]).map_err(|error| error.to_string())?;
        let specs = Vec::<LayerSpec>::deserialize(table["layers"].clone()).unwrap();
        let text = toml::to_string(&toml::Table::from_iter([(
            "layers".to_owned(),
            Value::try_from(&specs).unwrap(),
        )]));
        let again = document::parse(&text.unwrap()).unwrap();
        assert_eq!(Vec::<LayerSpec>::deserialize(again["layers"].clone()).unwrap(), specs);
        Architecture::Sequential.network(inputs, 10, &[], &specs).map_err(|error| error.to_string())
    }

    #[test]
    fn a_list_becomes_the_network_that_it_describes() {
        let image = &[1, 28, 28];
        let small_cnn = network(
            image,
            r#"[{ convolution = { channels = 16, size = 8, stride = 2, padding = 2 } }, "relu",
                { max_pool = { size = 2, stride = 1 } }, { convolution = { channels = 32, size = 4, stride = 2 } },
                "relu", { max_pool = { size = 2, stride = 1 } }, "flatten", { linear = 32 }, "relu",
                { linear = 10 }]"#,
        )
        .unwrap();
        assert_eq!(small_cnn.layout().parameters(), 26_010);
        let built_in = Architecture::SmallCnn.network(image, 10, &[], &[]).unwrap();
        let kinds = |network: &Network| network.layers().iter().map(Layer::kind).collect::<Vec<_>>();
        assert_eq!(kinds(&small_cnn), kinds(&built_in));
        let names = |network: &Network| {
            network.layout().tensors().iter().map(|tensor| tensor.name().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names(&small_cnn)[..3], ["layer01.bias", "layer01.weight", "layer04.bias"]);
        let residual = network(
            &[3, 9, 9],
            r#"[{ residual = { body = [{ convolution = { channels = 6, size = 3, stride = 2 } },
                                       { group_norm = { groups = 2 } }, "tanh"],
                               shortcut = [{ average_pool = { size = 3, stride = 2 } },
                                           { convolution = { channels = 6, size = 1 } }] } },
                { residual = { body = ["relu"] } }, "global-average-pool", { dropout = 0.5 }, { linear = 10 }]"#,
        )
        .unwrap();
        assert_eq!(
            names(&residual),
            [
                "layer01.body01.bias",
                "layer01.body01.weight",
                "layer01.body02.bias",
                "layer01.body02.weight",
                "layer01.shortcut02.bias",
                "layer01.shortcut02.weight",
                "layer05.bias",
                "layer05.weight"
            ]
        );
        assert_eq!(residual.layout().parameters(), 6 * 27 + 6 + 12 + 18 + 6 + 60 + 10);
        let words = network(
            &[12],
            r#"[{ embedding = { vocabulary = 50, width = 8 } }, "layer-norm", { linear = 10 }]"#,
        )
        .unwrap();
        assert_eq!(
            names(&words),
            ["layer01.weight", "layer02.bias", "layer02.weight", "layer03.bias", "layer03.weight"]
        );
        assert_eq!(words.layout().parameters(), 50 * 8 + 2 * 96 + 970);
        let first = &words.layout().initial(7)[..400];
        let square = first.iter().map(|value| value * value).sum::<f32>() / 400.0;
        assert!((square - 1.0).abs() < 0.3, "{square}");
        let dropout = residual.layers().iter().find(|layer| layer.kind() == "dropout");
        assert_eq!(dropout, Some(&Layer::Dropout { probability: 0.5 }));
    }

    #[test]
    fn every_misfit_is_one_line_that_names_the_layer() {
        let image = &[1, 8, 8][..];
        for (inputs, layers, words) in [
            (image, "3", "a list is needed"),
            (image, "[]", "needs at least one layer"),
            (image, "['flatten', 'reluu']", "layer 2: unknown layer \"reluu\"; did you mean `relu`?"),
            (image, "[{ linaer = 3 }]", "layer 1: unknown layer \"linaer\"; did you mean `linear`?"),
            (image, "['linear']", "layer 1: \"linear\" needs a value"),
            (image, "[{ relu = 3 }]", "`relu` takes no value"),
            (image, "[7]", "layer 1: a layer is a name"),
            (image, "[{ linear = 3, dropout = 0.1 }]", "a table with one key is needed"),
            (image, "[{}]", "a table with one key is needed"),
            (image, "['flatten', { linear = 'x' }]", "layer 2 (linear): invalid type"),
            (image, "['flatten', { linear = -1 }]", "layer 2 (linear): invalid value"),
            (image, "[{ convolution = 3 }]", "layer 1 (convolution): a table is needed"),
            (image, "[{ convolution = { chanels = 3, size = 2 } }]", "did you mean `channels`?"),
            (image, "[{ convolution = { channels = 3 } }]", "missing field `size`"),
            (image, "[{ max_pool = { size = 2 } }]", "missing field `stride`"),
            (image, "[{ residual = { shortcut = [] } }]", "layer 1 (residual): missing field `body`"),
            (image, "[{ residual = { body = 3 } }]", "layer 1, body: a list is needed"),
            (image, "[{ residual = { body = ['rlu'] } }]", "layer 1, body 1: unknown layer \"rlu\""),
            (
                image,
                "[{ linear = 10 }]",
                "layer 1 (linear): takes [features], but gets [1, 8, 8]: put \"flatten\"",
            ),
            (image, "['flatten', { linear = 0 }]", "layer 2 (linear): outputs = 0"),
            (image, "['flatten', { linear = 20 }]", "layer 2 (linear): yields [20], but the last layer must"),
            (image, "['flatten']", "layer 1 (flatten): yields [64], but the last layer must"),
            (&[10], "['relu']", "no layer has parameters"),
            (
                &[4],
                "[{ convolution = { channels = 3, size = 2 } }]",
                "takes [channels, height, width], but gets [4]",
            ),
            (&[4], "['global-average-pool']", "(global-average-pool): takes [channels"),
            (
                image,
                "[{ convolution = { channels = 3, size = 9 } }]",
                "a window of 9 does not fit into [1, 8, 8]",
            ),
            (image, "[{ convolution = { channels = 3, size = 2, stride = 0 } }]", "stride = 0"),
            (image, "[{ convolution = { channels = 3, size = 0 } }]", "size = 0"),
            (image, "[{ convolution = { channels = 3, size = 2, padding = 100000 } }]", "padding = 100000"),
            (image, "[{ average_pool = { size = 9, stride = 1 } }]", "(average_pool): a window of 9"),
            (image, "[{ max_pool = { size = 2, stride = 0 } }]", "stride = 0"),
            (&[6, 8, 8], "[{ group_norm = { groups = 4 } }]", "groups = 4 does not divide 6 channels"),
            (&[6, 8, 8], "[{ group_norm = { groups = 0 } }]", "groups = 0: 1 to 6"),
            (&[6], "[{ group_norm = { groups = 6 } }]", "each group would be a single value"),
            // pitfall 4: what mixes examples has no place here, with privacy or without.
            (
                image,
                "['batch-norm']",
                "layer 1: batch normalisation mixes the examples of a batch: use { group_norm",
            ),
            (image, "[{ batch_norm = { momentum = 0.1 } }]", "use { group_norm"),
            (image, "['layer-norm']", "(layer-norm): takes [features], but gets [1, 8, 8]: put \"flatten\""),
            (&[1], "['layer-norm']", "from 2, but gets 1"),
            (&[4], "[{ embedding = { vocabulary = 0, width = 2 } }]", "vocabulary = 0"),
            (image, "[{ embedding = { vocabulary = 9, width = 2 } }]", "takes [tokens], but gets [1, 8, 8]"),
            (
                &[4],
                "['relu', { embedding = { vocabulary = 9, width = 2 } }]",
                "layer 2 (embedding): takes numbers of the data: it can only be the first layer",
            ),
            (
                &[4],
                "[{ residual = { body = [{ embedding = { vocabulary = 9, width = 1 } }] } }]",
                "the first layer",
            ),
            (image, "[{ dropout = 1.0 }]", "layer 1 (dropout): probability 1: 0 to below 1"),
            (image, "[{ dropout = -inf }]", "probability -inf"),
            (
                image,
                "[{ residual = { body = [{ max_pool = { size = 2, stride = 2 } }] } }]",
                "layer 1 (residual): its body yields [1, 4, 4] and its shortcut [1, 8, 8]",
            ),
            (
                image,
                "['relu', { residual = { body = ['relu', { residual = { body = ['relu', { linear = 3 }] } }] } }]",
                "layer 2, body 2, body 2 (linear): takes [features]",
            ),
        ] {
            let error = network(inputs, layers).unwrap_err();
            assert!(error.starts_with("[model] layers: ") && error.contains(words), "{layers}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn length_and_depth_are_bounded() {
        let list = |count: usize, layer: &str| format!("[{}]", vec![layer; count].join(", "));
        let nested = |depth: usize| {
            (0..depth)
                .fold("'relu'".to_owned(), |inner, _| format!("{{ residual = {{ body = [{inner}] }} }}"))
        };
        assert!(network(&[10], &list(100, "'relu'")).unwrap_err().contains("at most 99"));
        let branch = list(99, "'relu'");
        let wide = list(11, &format!("{{ residual = {{ body = {branch} }} }}"));
        assert!(network(&[10], &wide).unwrap_err().contains("more than 1000 in all"));
        assert!(network(&[10], &format!("[{}, {{ linear = 10 }}]", nested(4))).is_ok());
        assert!(
            network(&[10], &format!("[{}, {{ linear = 10 }}]", nested(5))).unwrap_err().contains("4 deep")
        );
        let grow = "{ convolution = { channels = 1048576, size = 1, padding = 65536 } }";
        assert!(network(&[1, 8, 8], &list(99, grow)).unwrap_err().contains("more than 68719476736 values"));
        let huge = "['flatten', { linear = 1048576 }, { linear = 1048576 }, { linear = 10 }]";
        assert!(network(&[8], huge).unwrap_err().contains("parameters"));
    }
}
