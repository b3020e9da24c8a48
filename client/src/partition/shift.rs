//! How a client of a `feature-shift` partition sees its examples: turned, brighter or darker, noisy, the same in
//! every round.

use rand::RngExt;
use rand_distr::{Distribution, StandardNormal};
use tributary_common::ids::NodeName;
use tributary_common::rng::{Purpose, Stream};

use super::PartitionConfig;

/// One client's shift. It is drawn once per population; only its noise is drawn again, the same, whenever an
/// example is looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct Shift {
    seed: u64,
    client: NodeName,
    /// Anticlockwise, in degrees.
    rotation_degrees: f64,
    /// Multiplies every value.
    factor: f64,
    /// Standard deviation of what is added to every value.
    noise: f64,
    /// Height and width of an image's planes; whatever is not turned needs none.
    plane: [usize; 2],
}

impl Shift {
    /// The shift of client `index` (from 0) of `clients`, from the stream (`seed`, partition, `client`).
    ///
    /// Angle and factor are drawn in this order whether both are asked for or not.
    pub(super) fn draw(
        config: &PartitionConfig,
        seed: u64,
        (index, clients): (usize, usize),
        client: NodeName,
        plane: [usize; 2],
    ) -> Self {
        let mut stream = Stream::new(seed, Purpose::Partition, 0, client.as_str());
        let mut uniform = || 2.0 * stream.random::<f64>() - 1.0;
        let rotation_degrees = config.rotation_degrees.unwrap_or(0.0) * uniform();
        let factor = 1.0 + config.intensity.unwrap_or(0.0) * uniform();
        let noise = config.noise.unwrap_or(0.0) * (index + 1) as f64 / clients.max(1) as f64;
        Self { seed, client, rotation_degrees, factor, noise, plane }
    }

    #[cfg(test)]
    pub(super) fn turn_by(&mut self, degrees: f64) {
        self.rotation_degrees = degrees;
    }

    /// The example at `position` of the data set, whose values are `row`, as the client sees it: turned about its
    /// middle, then multiplied, then with noise from the stream (seed, feature noise, position, client).
    pub(crate) fn apply(&self, position: u32, row: &[f32]) -> Vec<f32> {
        let mut values: Vec<f64> = row.iter().map(|value| f64::from(*value)).collect();
        let [height, width] = self.plane;
        if self.rotation_degrees != 0.0 && height * width > 0 {
            values = values
                .chunks(height * width)
                .flat_map(|plane| turned(plane, height, width, self.rotation_degrees))
                .collect();
        }
        if self.factor != 1.0 {
            values.iter_mut().for_each(|value| *value *= self.factor);
        }
        if self.noise > 0.0 {
            let mut stream = Stream::new(self.seed, Purpose::FeatureNoise, position, self.client.as_str());
            for value in &mut values {
                let normal: f64 = StandardNormal.sample(&mut stream);
                *value += self.noise * normal;
            }
        }
        let finite = f64::from(f32::MIN)..=f64::from(f32::MAX);
        values.into_iter().map(|value| value.clamp(*finite.start(), *finite.end()) as f32).collect()
    }
}

/// One plane of an image, turned anticlockwise about its middle; between pixels by bilinear interpolation, and
/// outside the plane as at its nearest edge.
fn turned(plane: &[f64], height: usize, width: usize, degrees: f64) -> Vec<f64> {
    let (sine, cosine) = degrees.to_radians().sin_cos();
    let (bottom, right) = ((height - 1) as f64, (width - 1) as f64);
    let (middle_y, middle_x) = (bottom / 2.0, right / 2.0);
    let pixel = |y: f64, x: f64| plane.get(y as usize * width + x as usize).copied().unwrap_or(0.0);
    let value = |at: usize| {
        let (dy, dx) = ((at / width) as f64 - middle_y, (at % width) as f64 - middle_x);
        let y = (middle_y + dx * sine + dy * cosine).clamp(0.0, bottom);
        let x = (middle_x + dx * cosine - dy * sine).clamp(0.0, right);
        let (above, left) = (y.floor(), x.floor());
        let (below, beside) = ((above + 1.0).min(bottom), (left + 1.0).min(right));
        let (down, across) = (y - above, x - left);
        let upper = pixel(above, left) * (1.0 - across) + pixel(above, beside) * across;
        let lower = pixel(below, left) * (1.0 - across) + pixel(below, beside) * across;
        upper * (1.0 - down) + lower * down
    };
    (0..height * width).map(value).collect()
}
