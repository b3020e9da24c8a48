//! The built-in image set: digits drawn with a pen, 28 × 28, one grey channel, ten classes.
//!
//! Each image is a class's strokes, wobbled, turned, sheared, scaled and shifted, drawn with a pen of random
//! width and then disturbed pixel by pixel. It needs neither network nor download, a linear model cannot
//! master it, and a small convolutional one can. The drawing uses only the named stream and operations that
//! IEEE 754 rounds exactly (+ - × ÷ √), so the images are the same bytes on every machine.

use std::sync::Arc;

use rand::RngExt;
use tributary_common::rng::{Purpose, Stream};

use super::images::Normalisation;
use super::{DataConfig, DataError, Dataset, Split};

/// Height and width of an image, in pixels.
const SIDE: usize = 28;
/// Height of an upright digit of scale 1, in pixels.
const DIGIT: f64 = 22.0;

/// Points of one stroke: x to the right, y downwards, both 0 to 1.
type Stroke = &'static [(f64, f64)];

/// The strokes of digits 0 to 9.
const DIGITS: [&[Stroke]; 10] = [
    &[&[
        (0.50, 0.10),
        (0.68, 0.16),
        (0.78, 0.33),
        (0.80, 0.50),
        (0.78, 0.67),
        (0.68, 0.84),
        (0.50, 0.90),
        (0.32, 0.84),
        (0.22, 0.67),
        (0.20, 0.50),
        (0.22, 0.33),
        (0.32, 0.16),
        (0.50, 0.10),
    ]],
    &[&[(0.35, 0.26), (0.55, 0.10), (0.55, 0.90)]],
    &[&[
        (0.22, 0.28),
        (0.32, 0.14),
        (0.50, 0.10),
        (0.68, 0.14),
        (0.77, 0.28),
        (0.74, 0.42),
        (0.60, 0.58),
        (0.20, 0.90),
        (0.80, 0.90),
    ]],
    &[
        &[(0.24, 0.16), (0.45, 0.10), (0.66, 0.14), (0.75, 0.28), (0.66, 0.42), (0.45, 0.48)],
        &[(0.45, 0.48), (0.70, 0.54), (0.79, 0.70), (0.68, 0.85), (0.45, 0.90), (0.22, 0.84)],
    ],
    &[&[(0.62, 0.90), (0.62, 0.10), (0.18, 0.64), (0.82, 0.64)]],
    &[&[
        (0.76, 0.10),
        (0.28, 0.10),
        (0.25, 0.45),
        (0.50, 0.40),
        (0.72, 0.48),
        (0.79, 0.66),
        (0.70, 0.83),
        (0.48, 0.90),
        (0.22, 0.83),
    ]],
    &[&[
        (0.70, 0.12),
        (0.48, 0.20),
        (0.30, 0.40),
        (0.22, 0.64),
        (0.30, 0.83),
        (0.50, 0.90),
        (0.70, 0.83),
        (0.78, 0.67),
        (0.70, 0.52),
        (0.50, 0.46),
        (0.30, 0.54),
    ]],
    &[&[(0.20, 0.10), (0.80, 0.10), (0.45, 0.90)]],
    &[
        &[
            (0.50, 0.47),
            (0.34, 0.40),
            (0.28, 0.28),
            (0.32, 0.16),
            (0.50, 0.10),
            (0.68, 0.16),
            (0.72, 0.28),
            (0.66, 0.40),
            (0.50, 0.47),
        ],
        &[
            (0.50, 0.47),
            (0.70, 0.56),
            (0.77, 0.70),
            (0.69, 0.84),
            (0.50, 0.90),
            (0.31, 0.84),
            (0.23, 0.70),
            (0.30, 0.56),
            (0.50, 0.47),
        ],
    ],
    &[&[
        (0.30, 0.88),
        (0.52, 0.80),
        (0.70, 0.60),
        (0.78, 0.36),
        (0.70, 0.17),
        (0.50, 0.10),
        (0.30, 0.17),
        (0.22, 0.33),
        (0.30, 0.48),
        (0.50, 0.54),
        (0.70, 0.46),
    ]],
];

/// Draws the images that `config` asks for. A longer set begins with the images of a shorter one.
pub(super) fn load(config: &DataConfig) -> Result<Dataset, DataError> {
    let seed = config.seed.unwrap_or(0);
    let noise = config.noise.unwrap_or(0.1);
    let normalisation = Normalisation::new(config, 1)?;
    let half = |name: &str, examples: usize| {
        let mut stream = Stream::new(seed, Purpose::Synthetic, 0, name);
        let mut split = Split::default();
        for _ in 0..examples {
            let class = stream.random_range(0..DIGITS.len());
            let image = draw(class, noise, &mut stream);
            split.features.extend(normalisation.bytes(&image, SIDE * SIDE));
            split.labels.push(class as i64);
        }
        Arc::new(split)
    };
    Ok(Dataset {
        example_shape: vec![1, SIDE, SIDE],
        classes: DIGITS.len(),
        train: half("train", config.examples.unwrap_or(6_000)),
        test: half("test", config.test_examples.unwrap_or(1_000)),
        sites: None,
    })
}

/// Draws one digit.
fn draw(class: usize, noise: f64, stream: &mut Stream) -> Vec<u8> {
    let mut uniform = |from: f64, to: f64| from + (to - from) * stream.random::<f64>();
    let (cos, sin) = turn(uniform(-0.18, 0.18));
    let shear = uniform(-0.3, 0.3);
    let (wide, high) = (DIGIT * uniform(0.7, 1.05), DIGIT * uniform(0.75, 1.05));
    let middle = SIDE as f64 / 2.0;
    let (right, down) = (middle + uniform(-3.0, 3.0), middle + uniform(-3.0, 3.0));
    let pen = uniform(0.7, 1.6);
    let ink = uniform(0.7, 1.0);

    let mut grey = vec![0.0f64; SIDE * SIDE];
    for stroke in DIGITS.get(class).copied().unwrap_or_default() {
        let mut last: Option<(f64, f64)> = None;
        for (x, y) in *stroke {
            let (x, y) = (x - 0.5 + uniform(-0.035, 0.035), y - 0.5 + uniform(-0.035, 0.035));
            let (x, y) = (wide * (x - shear * y), high * y);
            let point = (right + cos * x - sin * y, down + sin * x + cos * y);
            if let Some(last) = last {
                segment(&mut grey, last, point, pen);
            }
            last = Some(point);
        }
    }
    grey.iter()
        .map(|covered| {
            // Four uniforms less two have mean 0 and variance 1/3: near enough to a normal distribution,
            // whose tails would go through exp and log, which differ between libraries.
            let sum: f64 = (0..4).map(|_| stream.random::<f64>()).sum();
            let value = covered * ink + noise * (sum - 2.0) * 3f64.sqrt();
            (value.clamp(0.0, 1.0) * 255.0).round() as u8
        })
        .collect()
}

/// Cosine and sine of the angle whose half has the tangent `t`.
fn turn(t: f64) -> (f64, f64) {
    let square = t * t;
    ((1.0 - square) / (1.0 + square), 2.0 * t / (1.0 + square))
}

/// Draws a line with round ends; each pixel keeps the greatest coverage that a stroke gave it.
fn segment(grey: &mut [f64], (ax, ay): (f64, f64), (bx, by): (f64, f64), pen: f64) {
    let reach = pen + 1.0;
    // The casts saturate: a point outside the image is clipped.
    let clip = |low: f64, high: f64| {
        let first = (low - reach).floor().max(0.0) as usize;
        let end = ((high + reach).ceil().max(0.0) as usize + 1).min(SIDE);
        first..end
    };
    let (dx, dy) = (bx - ax, by - ay);
    let length_squared = (dx * dx + dy * dy).max(1e-12);
    for y in clip(ay.min(by), ay.max(by)) {
        for x in clip(ax.min(bx), ax.max(bx)) {
            let (px, py) = (x as f64 + 0.5 - ax, y as f64 + 0.5 - ay);
            let along = ((px * dx + py * dy) / length_squared).clamp(0.0, 1.0);
            let (ex, ey) = (px - along * dx, py - along * dy);
            let covered = (pen + 0.5 - (ex * ex + ey * ey).sqrt()).clamp(0.0, 1.0);
            if let Some(pixel) = grey.get_mut(y * SIDE + x) {
                *pixel = pixel.max(covered);
            }
        }
    }
}
