//! The built-in architectures as shapes: enough for a coordinator to hold and start a model without libtorch.

use serde::{Deserialize, Serialize};

use super::Layout;
use super::layout::Start;
use crate::limits::{CLASSES, MODEL_PARAMETERS};

/// The built-in architectures, by their names in a job file.
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
}

/// Groups of every GroupNorm layer in `resnet8-gn`.
pub const GROUP_NORM_GROUPS: usize = 8;

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
        }
    }

    /// The named tensors of this architecture for examples of shape `inputs`.
    ///
    /// Names and shapes are PyTorch's: a linear weight is `[out, in]`, a convolution's `[out, in, h, w]`.
    pub fn layout(
        self,
        inputs: &[usize],
        classes: usize,
        hidden: &[usize],
    ) -> Result<Layout, ArchitectureError> {
        if inputs.is_empty() || inputs.len() > 3 || inputs.iter().any(|size| !(1..=65_536).contains(size)) {
            return Err(ArchitectureError::Inputs(inputs.to_vec()));
        }
        if !(2..=CLASSES).contains(&classes) {
            return Err(ArchitectureError::Classes(classes));
        }
        let wrong_hidden = |why| Err(ArchitectureError::Hidden(self.name(), hidden.to_vec(), why));
        match self {
            Self::Mlp if hidden.is_empty() => return wrong_hidden("needs the widths of its hidden layers"),
            Self::Mlp if hidden.len() > 64 => return wrong_hidden("takes at most 64 hidden layers"),
            Self::Mlp if hidden.iter().any(|width| !(1..=1 << 20).contains(width)) => {
                return wrong_hidden("takes widths from 1 to 1048576");
            }
            Self::Mlp => {}
            _ if !hidden.is_empty() => return wrong_hidden("has no such setting; only `mlp` does"),
            _ => {}
        }
        let features = inputs.iter().product();
        let mut layers = Layers(Vec::new());
        match self {
            Self::Logistic => layers.linear("linear", features, classes),
            Self::Mlp => layers.perceptron(features, hidden, classes),
            Self::TwoNn => layers.perceptron(features, &[200, 200], classes),
            Self::SmallCnn => {
                let (channels, image) = self.image(inputs)?;
                let image = self.window(inputs, image, 8, 2, 2)?;
                let image = self.window(inputs, image, 2, 1, 0)?;
                let image = self.window(inputs, image, 4, 2, 0)?;
                let (height, width) = self.window(inputs, image, 2, 1, 0)?;
                layers.convolution("conv1", channels, 16, 8);
                layers.convolution("conv2", 16, 32, 4);
                layers.linear("linear1", 32 * height * width, 32);
                layers.linear("linear2", 32, classes);
            }
            Self::McmahanCnn => {
                let (channels, image) = self.image(inputs)?;
                let image = self.window(inputs, image, 2, 2, 0)?;
                let (height, width) = self.window(inputs, image, 2, 2, 0)?;
                layers.convolution("conv1", channels, 32, 5);
                layers.convolution("conv2", 32, 64, 5);
                layers.linear("linear1", 64 * height * width, 512);
                layers.linear("linear2", 512, classes);
            }
            Self::Lenet => {
                let (channels, image) = self.image(inputs)?;
                let image = self.window(inputs, image, 2, 2, 0)?;
                let image = self.window(inputs, image, 5, 1, 0)?;
                let (height, width) = self.window(inputs, image, 2, 2, 0)?;
                layers.convolution("conv1", channels, 6, 5);
                layers.convolution("conv2", 6, 16, 5);
                layers.linear("linear1", 16 * height * width, 120);
                layers.linear("linear2", 120, 84);
                layers.linear("linear3", 84, classes);
            }
            Self::Resnet8Gn => {
                let (channels, _) = self.image(inputs)?;
                layers.convolution("stem", channels, 16, 3);
                layers.group_norm("stem_norm", 16);
                for (stage, from, to) in [(1, 16, 16), (2, 16, 32), (3, 32, 64)] {
                    layers.convolution(&format!("stage{stage}.conv1"), from, to, 3);
                    layers.group_norm(&format!("stage{stage}.norm1"), to);
                    layers.convolution(&format!("stage{stage}.conv2"), to, to, 3);
                    layers.group_norm(&format!("stage{stage}.norm2"), to);
                    if from != to {
                        layers.convolution(&format!("stage{stage}.shortcut"), from, to, 1);
                    }
                }
                layers.linear("linear", 64, classes);
            }
        }
        let size =
            |shape: &[usize]| shape.iter().fold(1u64, |product, side| product.saturating_mul(*side as u64));
        let parameters = layers.0.iter().fold(0u64, |sum, (_, shape, _)| sum.saturating_add(size(shape)));
        if parameters > MODEL_PARAMETERS {
            return Err(ArchitectureError::TooLarge);
        }
        Ok(Layout::new(layers.0))
    }

    fn image(self, inputs: &[usize]) -> Result<(usize, (usize, usize)), ArchitectureError> {
        match inputs {
            [channels, height, width] => Ok((*channels, (*height, *width))),
            _ => Err(ArchitectureError::NotAnImage(self.name(), inputs.to_vec())),
        }
    }

    /// Output size of a window (convolution or pooling) of `size` with `stride` and `padding`.
    fn window(
        self,
        inputs: &[usize],
        (height, width): (usize, usize),
        size: usize,
        stride: usize,
        padding: usize,
    ) -> Result<(usize, usize), ArchitectureError> {
        let too_small = || ArchitectureError::TooSmall(self.name(), inputs.to_vec());
        let side = |length: usize| {
            (length + 2 * padding).checked_sub(size).map(|rest| rest / stride + 1).ok_or_else(too_small)
        };
        Ok((side(height)?, side(width)?))
    }
}

/// Tensors as they are declared, before they are sorted.
struct Layers(Vec<(String, Vec<usize>, Start)>);

impl Layers {
    fn weight_and_bias(&mut self, name: &str, weight: Vec<usize>, outputs: usize, start: [Start; 2]) {
        self.0.push((format!("{name}.weight"), weight, start[0]));
        self.0.push((format!("{name}.bias"), vec![outputs], start[1]));
    }

    fn linear(&mut self, name: &str, inputs: usize, outputs: usize) {
        self.weight_and_bias(name, vec![outputs, inputs], outputs, [Start::FanIn(inputs); 2]);
    }

    fn convolution(&mut self, name: &str, inputs: usize, outputs: usize, size: usize) {
        let start = [Start::FanIn(inputs * size * size); 2];
        self.weight_and_bias(name, vec![outputs, inputs, size, size], outputs, start);
    }

    fn group_norm(&mut self, name: &str, channels: usize) {
        let start = [Start::Constant(1.0), Start::Constant(0.0)];
        self.weight_and_bias(name, vec![channels], channels, start);
    }

    fn perceptron(&mut self, inputs: usize, hidden: &[usize], classes: usize) {
        let mut before = inputs;
        for (index, width) in hidden.iter().chain([&classes]).enumerate() {
            self.linear(&format!("linear{}", index + 1), before, *width);
            before = *width;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_parameter_counts() {
        let count = |architecture: Architecture, inputs: &[usize], classes, hidden: &[usize]| {
            architecture.layout(inputs, classes, hidden).unwrap().parameters()
        };
        assert_eq!(count(Architecture::Logistic, &[13], 2, &[]), 28);
        assert_eq!(count(Architecture::TwoNn, &[1, 28, 28], 10, &[]), 199_210);
        assert_eq!(count(Architecture::SmallCnn, &[1, 28, 28], 10, &[]), 26_010);
        assert_eq!(count(Architecture::McmahanCnn, &[1, 28, 28], 10, &[]), 1_663_370);
        assert_eq!(count(Architecture::Lenet, &[1, 28, 28], 10, &[]), 61_706);
        assert_eq!(count(Architecture::Mlp, &[784], 10, &[200, 200]), 199_210);
        assert_eq!(count(Architecture::Resnet8Gn, &[3, 32, 32], 10, &[]), 78_186);
    }

    #[test]
    fn what_does_not_fit_is_refused_in_words() {
        let refusal = |architecture: Architecture, inputs: &[usize], classes, hidden: &[usize]| {
            architecture.layout(inputs, classes, hidden).unwrap_err().to_string()
        };
        assert!(refusal(Architecture::SmallCnn, &[13], 2, &[]).contains("[channels, height, width]"));
        assert!(refusal(Architecture::SmallCnn, &[1, 8, 8], 2, &[]).contains("smaller than its windows"));
        assert!(refusal(Architecture::Logistic, &[0], 2, &[]).contains("inputs = [0]"));
        assert!(refusal(Architecture::Logistic, &[], 2, &[]).contains("inputs = []"));
        assert!(refusal(Architecture::Logistic, &[4], 1, &[]).contains("classes = 1"));
        assert!(refusal(Architecture::Mlp, &[4], 2, &[]).contains("hidden"));
        assert!(refusal(Architecture::TwoNn, &[4], 2, &[10]).contains("only `mlp` does"));
        assert!(refusal(Architecture::Mlp, &[65_536, 65_536, 65_536], 2, &[1 << 20]).contains("more than"));
    }

    #[test]
    fn first_parameters_depend_on_the_seed_alone_and_keep_their_bounds() {
        let layout = Architecture::Resnet8Gn.layout(&[1, 28, 28], 10, &[]).unwrap();
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
