//! How an audit watches private training, and what it may change: never part of a node's work.

/// Watches every release point of private training, and may steer it.
///
/// An audit plants units of its own, and replays a training on a neighbouring data set with the same batches and the
/// same results. What the watcher learns is not private: a recorder belongs to audit jobs on data that may be seen.
pub trait Recorder: Send {
    /// Step `step`, from 1, has drawn these `units`, as positions in the client's own. They may be replaced.
    fn sampled(&mut self, step: u64, units: &mut Vec<u32>) {
        let _ = (step, units);
    }

    /// Calls `add` with the raw gradient of each unit that the audit plants in `step`, in the order of the layout: it is
    /// clipped and summed as any unit's.
    fn inject(&mut self, step: u64, add: &mut dyn FnMut(&[f32])) {
        let _ = (step, add);
    }

    /// The noised sum of a step; everything after it follows from `release.released` alone, which may be replaced.
    fn released(&mut self, release: Release<'_>);
}

/// One noised sum.
#[derive(Debug)]
pub struct Release<'a> {
    /// The step, from 1.
    pub step: u64,
    /// Sum of the clipped gradients of the client's own units, in the order of the layout.
    pub sum: &'a [f32],
    /// The sum of all clipped gradients with noise: what leaves the mechanism, before the public divisor.
    pub released: &'a mut [f32],
    /// Sum of the squares of the noise, over `sum.len()` coordinates.
    pub noise_squares: f64,
    /// The clip norm C of the step.
    pub clip_norm: f64,
    /// Largest norm that one unit adds to the sum, as declared.
    pub sensitivity: f64,
    /// Standard deviation of the noise, as declared.
    pub noise_standard_deviation: f64,
    /// With adaptive clipping, the noised count that moves the clip norm.
    pub count: Option<CountRelease<'a>>,
}

/// The noised count of adaptive clipping.
#[derive(Debug)]
pub struct CountRelease<'a> {
    /// Σ (b − ½) over the units of the batch, b = 1 for a norm of at most C; planted units are not counted.
    pub sum: f64,
    /// The same with noise.
    pub released: &'a mut f64,
    /// Most that one unit changes of it: ½.
    pub sensitivity: f64,
    /// Standard deviation of the noise.
    pub noise_standard_deviation: f64,
}
