//! Updates on their way: one length for everybody under masks, sums that are what was summed, and bytes that are refused.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::ids::NodeName;
use crate::model::to_bytes;

fn client() -> NodeName {
    NodeName::literal("clinic")
}

fn job(more: &str) -> Job {
    let train = if more.contains("distributed") { "sampling_rate = 0.25" } else { "batch_size = 4" };
    Job::parse(&format!(
        "name = 'j'\nseed = 5\nrounds = 3\n[model]\narchitecture = 'logistic'\ninputs = [9]\nclasses = 3\n[train]\n\
         algorithm = 'fedavg'\nlearning_rate = 0.1\nlocal_steps = 1\n{train}\n[cohort]\nsize = 4\nminimum = 3\n{more}"
    ))
    .unwrap()
}

const MASKS: &str = "[secure_aggregation]\nenabled = true\n";
const SUPPORT: &str = "[secure_aggregation]\nenabled = true\n[compression]\nscheme = 'top-k'\ndensity = 0.4\n\
    support = 'delayed-vote'\n";
const DISTRIBUTED: &str = "[secure_aggregation]\nenabled = true\n[privacy]\nunit = 'example'\n\
    mechanism = 'distributed'\nnoise_multiplier = 2.0\nclip_norm = 1.0\nexpected_batch_size = 40\ndelta = 1e-5\n\
    max_epsilon = 50.0\n";

fn encoded(job: &Job, values: &[f32], examples: u64, loss: Option<f64>) -> Encoded {
    let support = RoundSupport::first(job).unwrap();
    let mut coins = Coins::of(job, 1, &client()).unwrap();
    let values = ClientValues { values, examples, loss };
    Masked::of(job).unwrap().encode(&values, 1, support.as_ref(), &mut coins).unwrap()
}

/// A18, at any level: whatever a client has to say, its masked update has the job's one length, and bytes of any other
/// length are refused, by a coordinator that knows nothing else of them.
#[test]
fn a18_an_update_has_one_length_whatever_is_in_it() {
    for more in [MASKS, SUPPORT, DISTRIBUTED] {
        let job = job(more);
        let masked = Masked::of(&job).unwrap();
        let bytes = masked.update_bytes();
        let updates: [(f32, u64, Option<f64>); 5] = [
            (0.0, 1, None),
            (0.0, u64::MAX, Some(0.0)),
            (1e30, 3, Some(1e300)),
            (-1e-30, 700, Some(f64::NAN)),
            (0.25, 0, Some(-4.0)),
        ];
        for (value, examples, loss) in updates {
            let own = encoded(&job, &[value; 30], examples, loss).integers.to_bytes().unwrap();
            assert_eq!(own.len() as u64, bytes, "{more}: {value}, {examples}");
            assert!(masked.check(&own).is_ok());
        }
        for length in (0..bytes + 9).filter(|length| *length != bytes) {
            let refused = masked.check(&vec![0; length as usize]).unwrap_err().to_string();
            assert!(refused.contains(&format!("a masked update of this job has {bytes}")), "{refused}");
        }
        assert_eq!(Exchange::of(&job).unwrap().update_bytes(), (bytes, bytes));
    }
}

#[test]
fn values_of_another_model_are_refused() {
    for more in [MASKS, SUPPORT, DISTRIBUTED] {
        let job = job(more);
        let support = RoundSupport::first(&job).unwrap();
        let mut coins = Coins::of(&job, 1, &client()).unwrap();
        for length in [0, 29, 31] {
            let values = ClientValues { values: &vec![0.0; length], examples: 1, loss: None };
            let outcome = Masked::of(&job).unwrap().encode(&values, 1, support.as_ref(), &mut coins);
            let Err(error) = outcome else { panic!("{more}: {length} values were taken") };
            assert_eq!(error.to_string(), format!("{length} values, but 30 are expected"));
        }
    }
}

#[test]
fn a_sum_is_the_weighted_mean_of_what_was_summed_in_any_order() {
    let job = job(MASKS);
    let masked = Masked::of(&job).unwrap();
    let update = |client: u64| {
        let values: Vec<f32> = (0..30).map(|at| (at as f32 - 12.0) * 0.003 * client as f32).collect();
        (values, 10 * client)
    };
    let bytes: Vec<Vec<u8>> = (1..=3)
        .map(|client| {
            let (values, examples) = update(client);
            encoded(&job, &values, examples, Some(0.5)).integers.to_bytes().unwrap()
        })
        .collect();
    let opened = |order: [usize; 3]| {
        let mut sum = masked.sum();
        order.iter().for_each(|client| sum.add(&bytes[*client]).unwrap());
        masked.open(sum, 1).unwrap()
    };
    let (one, other) = (opened([0, 1, 2]), opened([2, 0, 1]));
    assert_eq!((&one.summed, format!("{one:?}")), (&other.summed, format!("{other:?}")));
    let summed = one.summed.unwrap();
    assert_eq!((summed.weight, summed.examples), (60, 60));
    assert!((summed.loss().unwrap() - 0.5).abs() < 1e-6);
    let model = masked.next_model(&Arc::new(vec![0.0; 30]), &one, &job, 1, None).unwrap();
    for (at, value) in model.iter().enumerate() {
        let mean: f32 = (1..=3).map(|client| update(client).0[at] * client as f32 / 6.0).sum();
        assert!((value - mean).abs() < 2e-3, "{at}: {value}, {mean}");
    }
}

proptest! {
    #[test]
    fn dense_updates_are_the_values_and_nothing_else(values in proptest::collection::vec(-4.0f32..4.0, 30)) {
        let plain = Plain::of(&job("")).unwrap();
        let bytes = to_bytes(&values);
        prop_assert_eq!(plain.update_bytes(), (120, 120));
        prop_assert_eq!(plain.decode(&bytes).unwrap(), values);
        prop_assert!((0..120).all(|length| plain.decode(&bytes[..length]).is_err()));
    }

    /// Without masks: what is encoded is read back, and no part of it passes for the whole.
    #[test]
    fn plain_updates_are_read_back_and_parts_are_refused(
        values in proptest::collection::vec(-4.0f32..4.0, 30),
        scheme in proptest::sample::select(vec![
            "[compression]\nscheme = 'int8'\n", "[compression]\nscheme = 'qsgd'\n",
            "[compression]\nscheme = 'top-k'\ndensity = 0.2\n",
        ]),
    ) {
        let job = job(scheme);
        let plain = Plain::of(&job).unwrap();
        let mut coins = Coins::of(&job, 1, &client()).unwrap();
        let encoded = plain.encode(&values, &mut coins).unwrap();
        let read = plain.decode(&encoded.bytes).unwrap();
        prop_assert_eq!(read.len(), 30);
        if let Some(residual) = &encoded.residual {
            for ((value, kept), read) in values.iter().zip(residual).zip(&read) {
                prop_assert!((value - kept - read).abs() < 1e-5);
            }
        }
        let (least, most) = plain.update_bytes();
        prop_assert!((least..=most).contains(&(encoded.bytes.len() as u64)));
        for length in 0..encoded.bytes.len() {
            prop_assert!(plain.decode(&encoded.bytes[..length]).is_err(), "{} of {}", length, encoded.bytes.len());
        }
        let longer = [&encoded.bytes[..], &[0]].concat();
        prop_assert!(plain.decode(&longer).is_err());
    }
}
