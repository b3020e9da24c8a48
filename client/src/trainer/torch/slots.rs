//! The values that flow through a network, and the loss's slopes with respect to them.

use tch::TchError;

use super::memory::Memory;

/// One block of values per slot, and one of slopes where the network is trained. An image lies as height, width,
/// channel; anything else in its own order.
pub(super) struct Slots {
    values: Vec<Memory>,
    slopes: Vec<Memory>,
}

impl Slots {
    /// Slots of `sizes` values for each of `examples`.
    pub(super) fn new(sizes: &[usize], examples: usize, trained: bool) -> Result<Self, TchError> {
        let blocks =
            || sizes.iter().map(|size| Memory::zeros(size * examples)).collect::<Result<Vec<_>, _>>();
        Ok(Self { values: blocks()?, slopes: if trained { blocks()? } else { Vec::new() } })
    }

    /// The values of a slot.
    pub(super) fn value(&self, slot: usize) -> &Memory {
        &self.values[slot]
    }

    /// The slopes of a slot.
    pub(super) fn slope(&self, slot: usize) -> &Memory {
        &self.slopes[slot]
    }

    /// The values of a slot, to write.
    pub(super) fn value_mut(&mut self, slot: usize) -> &mut [f32] {
        self.values[slot].values_mut()
    }

    /// The slopes of a slot, to write.
    pub(super) fn slope_mut(&mut self, slot: usize) -> &mut [f32] {
        self.slopes[slot].values_mut()
    }

    /// The values of one slot, and the slopes of the same to write.
    pub(super) fn value_and_slope_mut(&mut self, slot: usize) -> (&[f32], &mut [f32]) {
        (self.values[slot].values(), self.slopes[slot].values_mut())
    }

    /// The values of slot `from`, and those of slot `into` to write.
    pub(super) fn values_pair(&mut self, from: usize, into: usize) -> (&[f32], &mut [f32]) {
        pair(&mut self.values, from, into)
    }

    /// The slopes of slot `from`, and those of slot `into` to write.
    pub(super) fn slopes_pair(&mut self, from: usize, into: usize) -> (&[f32], &mut [f32]) {
        pair(&mut self.slopes, from, into)
    }
}

impl Slots {
    /// Multiplies each example's slopes in the slot `output` by its factor. Both slots come with their values per
    /// example. Where the factor is zero, the example's values in the slot `input` become zero too: they may be no
    /// numbers, and zero times such a value is none either.
    pub(super) fn scale(&mut self, input: (usize, usize), output: (usize, usize), factors: &[f32]) {
        let slopes = self.slopes[output.0].values_mut().chunks_exact_mut(output.1.max(1));
        let inputs = self.values[input.0].values_mut().chunks_exact_mut(input.1.max(1));
        for (factor, (slopes, input)) in factors.iter().zip(slopes.zip(inputs)) {
            if *factor == 0.0 {
                slopes.fill(0.0);
                input.fill(0.0);
            } else {
                slopes.iter_mut().for_each(|slope| *slope *= factor);
            }
        }
    }
}

/// Two different blocks; empty slices for one and the same, which no compiled network asks for.
fn pair(blocks: &mut [Memory], from: usize, into: usize) -> (&[f32], &mut [f32]) {
    match blocks.get_disjoint_mut([from, into]) {
        Ok([from, into]) => (from.values(), into.values_mut()),
        Err(_) => (&[], &mut []),
    }
}
