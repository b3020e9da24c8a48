//! The architectures that a job may name, each as a list of layers: enough for a coordinator to hold and start a
//! model without libtorch.

use serde::{Deserialize, Serialize};

use super::network::{Layer, Network, check_ends};
use super::sequential::{self, LayerSpec};
use crate::limits::{CLASSES, EXAMPLE_VALUES, MODEL_PARAMETERS};

/// The architectures, by their names in a job file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Architecture {
    /// One linear layer and softmax: multinomial logistic regression.
    Logistic,
    /// Linear layers of the job's `hidden` widths with ReLU between them.
    Mlp,
    /// The MNIST 2NN of McMahan et al. 2017: two hidden layers of 200; 199,210 parameters on 28×28.
    #[serde(rename = "2nn")]
    TwoNn,
    /// Two convolutions and two linear layers (Opacus' MNIST example); 26,010 parameters on 28×28.
    SmallCnn,
    /// The MNIST CNN of McMahan et al. 2017; 1,663,370 parameters on 28×28.
    McmahanCnn,
    /// LeNet-5 with ReLU and max-pooling, first convolution padded.
    Lenet,
    /// A residual network of three stages (16, 32, 64 channels) with GroupNorm, never BatchNorm.
    Resnet8Gn,
    /// The job's own `layers`.
    Sequential,
}

/// Why an architecture does not fit its inputs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArchitectureError {
    /// Convolutions need images.
    #[error("`{0}` needs [model] inputs = [channels, height, width], but inputs = {1:?}")]
    NotAnImage(&'static str, Vec<usize>),
    /// The image is too small for the layers.
    #[error("`{0}` cannot take inputs = {1:?}: the image is smaller than its windows")]
    TooSmall(&'static str, Vec<usize>),
    /// No inputs, or a zero among them, or too many.
    #[error("[model] inputs = {0:?}: one to three sizes, each from 1 to 65536, are possible")]
    Inputs(Vec<usize>),
    /// One class is nothing to tell apart.
    #[error("[model] classes = {0}: 2 to {CLASSES} are possible")]
    Classes(usize),
    /// `hidden` is given where it means nothing, missing where it is needed, or has a zero.
    #[error("[model] hidden = {1:?}: `{0}` {2}")]
    Hidden(&'static str, Vec<usize>, &'static str),
    /// The model is larger than anybody accepts.
    #[error("the model would have more than {MODEL_PARAMETERS} parameters")]
    TooLarge,
    /// A layer makes more of an example than anybody can hold.
    #[error("an example would have more than {EXAMPLE_VALUES} values in the network")]
    ExampleTooLarge,
    /// `layers` is given to an architecture that has its own.
    #[error("[model] layers: `{0}` has no such setting; only `sequential` does")]
    LayersElsewhere(&'static str),
    /// `sequential` without layers.
    #[error(
        "[model] layers: `sequential` needs at least one layer, such as [\"flatten\", {{ linear = 10 }}]"
    )]
    NoLayers,
    /// Nothing to train.
    #[error("[model] layers: no layer has parameters; add a linear or a convolution")]
    NoParameters,
    /// `layers` is not a list of layers, or too long or too deep.
    #[error("[model] layers: {0}")]
    Layers(String),
    /// A layer of the job is not understood, or does not take what the one before it yields.
    #[error("[model] layers: {position} ({kind}): {misfit}")]
    Layer {
        /// Where it stands, from 1: `layer 4`, or `layer 4, body 2` within a residual layer.
        position: String,
        /// Its kind, as in the job file.
        kind: &'static str,
        /// What does not fit.
        misfit: String,
    },
}

/// Groups of every GroupNorm layer in `resnet8-gn`.
const GROUP_NORM_GROUPS: usize = 8;

impl Architecture {
    /// The architecture's name in a job file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Logistic => "logistic",
            Self::Mlp => "mlp",
            Self::TwoNn => "2nn",
            Self::SmallCnn => "small-cnn",
            Self::McmahanCnn => "mcmahan-cnn",
            Self::Lenet => "lenet",
            Self::Resnet8Gn => "resnet8-gn",
            Self::Sequential => "sequential",
        }
    }

    /// The layers of this architecture for examples of shape `inputs`: `hidden` for `mlp`, `layers` for
    /// `sequential`, each empty for the others.
    pub(crate) fn network(
        self,
        inputs: &[usize],
        classes: usize,
        hidden: &[usize],
        layers: &[LayerSpec],
    ) -> Result<Network, ArchitectureError> {
        check_ends(inputs, classes)?;
        self.check_hidden(hidden)?;
        if self == Self::Sequential {
            return Network::new(inputs, classes, sequential::build(layers, inputs)?);
        }
        if !layers.is_empty() {
            return Err(ArchitectureError::LayersElsewhere(self.name()));
        }
        let list = self.built_in(inputs, classes, hidden);
        // The lists fit by themselves: what cannot fit is an image that the windows leave nothing of.
        list.and_then(|list| Network::new(inputs, classes, list)).map_err(|error| match error {
            ArchitectureError::Layer { .. } => ArchitectureError::TooSmall(self.name(), inputs.to_vec()),
            other => other,
        })
    }

    fn check_hidden(self, hidden: &[usize]) -> Result<(), ArchitectureError> {
        let wrong = |why| Err(ArchitectureError::Hidden(self.name(), hidden.to_vec(), why));
        match self {
            Self::Mlp if hidden.is_empty() => wrong("needs the widths of its hidden layers"),
            Self::Mlp if hidden.len() > 64 => wrong("takes at most 64 hidden layers"),
            Self::Mlp if hidden.iter().any(|width| !(1..=1 << 20).contains(width)) => {
                wrong("takes widths from 1 to 1048576")
            }
            Self::Mlp => Ok(()),
            _ if !hidden.is_empty() => wrong("has no such setting; only `mlp` does"),
            _ => Ok(()),
        }
    }

    fn built_in(
        self,
        inputs: &[usize],
        classes: usize,
        hidden: &[usize],
    ) -> Result<Vec<Layer>, ArchitectureError> {
        use Layer::{Flatten, GlobalAveragePool, MaxPool, Relu};
        let features = inputs.iter().product();
        let channels = || match inputs {
            [channels, _, _] => Ok(*channels),
            _ => Err(ArchitectureError::NotAnImage(self.name(), inputs.to_vec())),
        };
        // The features that `layers` leave of an example.
        let left = |layers: &[Layer]| {
            let shape = layers.iter().try_fold(inputs.to_vec(), |shape, layer| layer.output(&shape, ""))?;
            Ok(shape.iter().product::<usize>())
        };
        Ok(match self {
            Self::Logistic => vec![Flatten, linear("linear", features, classes)],
            Self::Mlp => perceptron(features, hidden, classes),
            Self::TwoNn => perceptron(features, &[200, 200], classes),
            Self::SmallCnn => {
                let mut layers = vec![
                    convolution("conv1", channels()?, 16, (8, 2, 2)),
                    Relu,
                    MaxPool { size: 2, stride: 1 },
                    convolution("conv2", 16, 32, (4, 2, 0)),
                    Relu,
                    MaxPool { size: 2, stride: 1 },
                    Flatten,
                ];
                layers.push(linear("linear1", left(&layers)?, 32));
                layers.extend([Relu, linear("linear2", 32, classes)]);
                layers
            }
            Self::McmahanCnn => {
                let mut layers = vec![
                    convolution("conv1", channels()?, 32, (5, 1, 2)),
                    Relu,
                    MaxPool { size: 2, stride: 2 },
                    convolution("conv2", 32, 64, (5, 1, 2)),
                    Relu,
                    MaxPool { size: 2, stride: 2 },
                    Flatten,
                ];
                layers.push(linear("linear1", left(&layers)?, 512));
                layers.extend([Relu, linear("linear2", 512, classes)]);
                layers
            }
            Self::Lenet => {
                let mut layers = vec![
                    convolution("conv1", channels()?, 6, (5, 1, 2)),
                    Relu,
                    MaxPool { size: 2, stride: 2 },
                    convolution("conv2", 6, 16, (5, 1, 0)),
                    Relu,
                    MaxPool { size: 2, stride: 2 },
                    Flatten,
                ];
                layers.push(linear("linear1", left(&layers)?, 120));
                layers.extend([Relu, linear("linear2", 120, 84), Relu, linear("linear3", 84, classes)]);
                layers
            }
            Self::Resnet8Gn => {
                let mut layers =
                    vec![convolution("stem", channels()?, 16, (3, 1, 1)), group_norm("stem_norm", 16), Relu];
                for (stage, from, to, stride) in [(1, 16, 16, 1), (2, 16, 32, 2), (3, 32, 64, 2)] {
                    let name = |part: &str| format!("stage{stage}.{part}");
                    let body = vec![
                        convolution(&name("conv1"), from, to, (3, stride, 1)),
                        group_norm(&name("norm1"), to),
                        Relu,
                        convolution(&name("conv2"), to, to, (3, 1, 1)),
                        group_norm(&name("norm2"), to),
                    ];
                    // The first stage keeps size and channels, so its shortcut is the identity.
                    let shortcut = match from == to {
                        true => Vec::new(),
                        false => vec![convolution(&name("shortcut"), from, to, (1, stride, 0))],
                    };
                    layers.extend([Layer::Residual { body, shortcut }, Relu]);
                }
                layers.extend([GlobalAveragePool, linear("linear", 64, classes)]);
                layers
            }
            Self::Sequential => Vec::new(),
        })
    }
}

fn linear(name: &str, inputs: usize, outputs: usize) -> Layer {
    Layer::Linear { name: name.to_owned(), inputs, outputs }
}

fn convolution(
    name: &str,
    inputs: usize,
    outputs: usize,
    (size, stride, padding): (usize, usize, usize),
) -> Layer {
    Layer::Convolution { name: name.to_owned(), inputs, outputs, size, stride, padding }
}

fn group_norm(name: &str, channels: usize) -> Layer {
    Layer::GroupNorm { name: name.to_owned(), channels, groups: GROUP_NORM_GROUPS }
}

fn perceptron(inputs: usize, hidden: &[usize], classes: usize) -> Vec<Layer> {
    let mut layers = vec![Layer::Flatten];
    let mut before = inputs;
    for (index, width) in hidden.iter().chain([&classes]).enumerate() {
        if index > 0 {
            layers.push(Layer::Relu);
        }
        layers.push(linear(&format!("linear{}", index + 1), before, *width));
        before = *width;
    }
    layers
}

#[cfg(test)]
mod tests {
    use super::super::digest;
    use super::*;
    use crate::digest::Digest;

    fn network(
        architecture: Architecture,
        inputs: &[usize],
        classes: usize,
        hidden: &[usize],
    ) -> Result<Network, ArchitectureError> {
        architecture.network(inputs, classes, hidden, &[])
    }

    /// Parameters, digests of tensor names with shapes, and of first values: changing one changes every model.
    #[test]
    fn layouts_and_first_values_are_frozen() {
        let image: &[usize] = &[1, 28, 28];
        let colour: &[usize] = &[3, 32, 32];
        for (architecture, inputs, classes, hidden, parameters, names, first) in [
            (
                Architecture::Logistic,
                &[13][..],
                2,
                &[][..],
                28,
                "2cc3981dfd5ff1ea476daeba522603e9cdf80d069817f304f90ade462691ff35",
                "dd04f88c33d7742459a0e42bb68138f7fae69563dbefbbc725d47b524a60c03f",
            ),
            (
                Architecture::TwoNn,
                image,
                10,
                &[],
                199_210,
                "5ed7fb575f3c801a6e03183ee3b82f12bbe3650a6ac85181e059aed713b87d02",
                "dff233c34e56c43f879c529d9a9088ac5315d1f0e242ef77b56682d2151f22a5",
            ),
            (
                Architecture::SmallCnn,
                image,
                10,
                &[],
                26_010,
                "97452c981a8469ecbd2a953ee4e845318168935766fc79151b6d07b16edf369d",
                "1d564305b563f969e3d10bc7dc07974b31c9b9c0ffcd61676df433efd4f27d11",
            ),
            (
                Architecture::McmahanCnn,
                image,
                10,
                &[],
                1_663_370,
                "ae40b79485f4ab6b9b075a5e25ba33f08ea0980824cda972a85c24985cee9e8f",
                "7893f042227253cec36efb8a004d9d50392c5a37087f90af9c318390d29af4b7",
            ),
            (
                Architecture::Lenet,
                image,
                10,
                &[],
                61_706,
                "6f035bced4cd5502e1982f64bcdf70ac31568483b356d3679371b5a9f7e5014c",
                "0f198dff57929c5e6b116dfb2317e95e271a015b1201e5c4ed13dc6966a7c820",
            ),
            (
                Architecture::Mlp,
                &[784],
                10,
                &[200, 200],
                199_210,
                "5ed7fb575f3c801a6e03183ee3b82f12bbe3650a6ac85181e059aed713b87d02",
                "dff233c34e56c43f879c529d9a9088ac5315d1f0e242ef77b56682d2151f22a5",
            ),
            (
                Architecture::Resnet8Gn,
                colour,
                10,
                &[],
                78_186,
                "e7150214c8214fb52265437882558b78060a312b71f117b6235668bf18ccf7b2",
                "f264118e586353000bc91004d9bbd888a887396db701d9767325e392d21822f4",
            ),
        ] {
            let layout = network(architecture, inputs, classes, hidden).unwrap().layout();
            let name = architecture.name();
            assert_eq!(layout.parameters(), parameters, "{name}");
            let shapes: Vec<String> = layout
                .tensors()
                .iter()
                .map(|tensor| format!("{} {:?}", tensor.name(), tensor.shape()))
                .collect();
            assert_eq!(Digest::of(shapes.join("\n").as_bytes()).to_string(), names, "{name}");
            assert_eq!(digest(&layout.initial(7)).to_string(), first, "{name}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_in_words() {
        let refusal = |architecture: Architecture, inputs: &[usize], classes, hidden: &[usize]| {
            network(architecture, inputs, classes, hidden).unwrap_err().to_string()
        };
        assert!(refusal(Architecture::SmallCnn, &[13], 2, &[]).contains("[channels, height, width]"));
        for architecture in [Architecture::SmallCnn, Architecture::McmahanCnn, Architecture::Lenet] {
            let words = refusal(architecture, &[1, 3, 8], 2, &[]);
            assert!(words.contains("smaller than its windows"), "{words}");
        }
        assert!(network(Architecture::Resnet8Gn, &[1, 1, 1], 2, &[]).is_ok());
        assert!(refusal(Architecture::Logistic, &[0], 2, &[]).contains("inputs = [0]"));
        assert!(refusal(Architecture::Logistic, &[], 2, &[]).contains("inputs = []"));
        assert!(refusal(Architecture::Logistic, &[4], 1, &[]).contains("classes = 1"));
        assert!(refusal(Architecture::Mlp, &[4], 2, &[]).contains("hidden"));
        assert!(refusal(Architecture::TwoNn, &[4], 2, &[10]).contains("only `mlp` does"));
        assert!(refusal(Architecture::Mlp, &[65_536, 65_536], 2, &[1 << 20]).contains("more than"));
        assert!(refusal(Architecture::Logistic, &[65_536; 3], 2, &[]).contains("more than"));
    }

    #[test]
    fn first_parameters_depend_on_the_seed_alone_and_keep_their_bounds() {
        let layout = network(Architecture::Resnet8Gn, &[1, 28, 28], 10, &[]).unwrap().layout();
        let values = layout.initial(7);
        assert_eq!(values, layout.initial(7));
        assert_ne!(values, layout.initial(8));
        let of = |name: &str| &values[layout.tensor(name).unwrap().range()];
        assert!(
            of("stem_norm.weight").iter().all(|v| *v == 1.0)
                && of("stem_norm.bias").iter().all(|v| *v == 0.0)
        );
        let stem = of("stem.weight");
        assert!(stem.iter().all(|v| v.abs() <= 1.0 / 3.0) && stem.iter().any(|v| v.abs() > 0.25));
    }
}
