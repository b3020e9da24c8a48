//! The order in which a client's examples are trained on.

use rand::seq::SliceRandom;

use tributary_common::rng::{Purpose, Stream};

use super::Task;

/// An endless sequence of batches, as positions within the client's part of the examples.
///
/// Each pass is a fresh shuffle of all positions, drawn from the stream (seed, shuffle, round, client). The last
/// batch of a pass is what is left of it, so no batch crosses from one pass into the next.
pub(super) struct Batches {
    stream: Stream,
    positions: Vec<u32>,
    size: usize,
    next: usize,
}

impl Batches {
    /// The batches of `task` for a client with `examples` examples.
    pub(super) fn new(task: &Task, examples: usize) -> Self {
        let stream = Stream::new(task.job.seed, Purpose::Shuffle, task.round, task.client.as_str());
        let size = usize::try_from(task.job.train.batch_size).unwrap_or(usize::MAX).max(1);
        let positions = (0..u32::try_from(examples).unwrap_or(u32::MAX)).collect();
        Self { stream, positions, size, next: examples }
    }

    /// The next batch; empty only when there are no examples.
    pub(super) fn next(&mut self) -> &[u32] {
        if self.next >= self.positions.len() {
            self.positions.sort_unstable();
            self.positions.shuffle(&mut self.stream);
            self.next = 0;
        }
        let start = self.next;
        self.next = start.saturating_add(self.size).min(self.positions.len());
        self.positions.get(start..self.next).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{job, task};
    use super::*;

    fn batches(examples: usize, size: u32, count: usize) -> Vec<Vec<u32>> {
        let mut job = job("logistic", &[2], 2);
        job.train.batch_size = size;
        let mut batches = Batches::new(&task(job, "a"), examples);
        (0..count).map(|_| batches.next().to_vec()).collect()
    }

    #[test]
    fn every_pass_holds_every_example_once_and_no_batch_crosses_its_end() {
        let batches = batches(10, 4, 9);
        assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2, 4, 4, 2, 4, 4, 2]);
        let passes: Vec<Vec<u32>> = batches.chunks(3).map(|pass| pass.concat()).collect();
        for pass in &passes {
            let mut sorted = pass.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert!(passes[0] != passes[1] && passes[1] != passes[2]);
    }

    #[test]
    fn a_batch_larger_than_the_client_is_the_client() {
        assert_eq!(batches(3, 1_000_000, 2).iter().map(Vec::len).collect::<Vec<_>>(), [3, 3]);
        assert!(batches(0, 4, 1)[0].is_empty());
    }

    /// The named stream and rand's shuffle together decide every published model.
    #[test]
    fn the_order_is_frozen() {
        assert_eq!(batches(8, 8, 1)[0], [5, 4, 6, 1, 7, 2, 0, 3]);
    }
}
