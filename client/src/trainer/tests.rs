use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;

use rand::RngExt;

use tributary_common::model::Architecture;
use tributary_common::rng::{Purpose, Stream};

use super::*;
use crate::data::Split;

/// A job with the defaults that the tests change.
pub(super) fn job(architecture: &str, inputs: &[usize], classes: usize) -> Job {
    let more = match architecture {
        "mlp" => "hidden = [16, 8]",
        "sequential" => {
            "layers = [{ convolution = { channels = 4, size = 3 } }, 'tanh', { average_pool = { size = 3, stride = 2 } },\
             { residual = { body = [{ group_norm = { groups = 2 } }, 'relu'] } }, 'flatten', { linear = 6 }]"
        }
        _ => "",
    };
    let text = format!(
        r#"
        name = "test"
        seed = 7
        rounds = 10
        [model]
        architecture = "{architecture}"
        inputs = {inputs:?}
        classes = {classes}
        {more}
        [train]
        algorithm = "fedavg"
        learning_rate = 0.1
        local_epochs = 1
        batch_size = 4
        [cohort]
        size = 1
        "#
    );
    Job::parse(&text).unwrap()
}

/// The first round of `client` in `job`, from the job's first parameters.
pub(super) fn task(job: Job, client: &str) -> Task {
    let model = job.layout().unwrap().initial(job.seed).into();
    Task {
        job: Arc::new(job),
        round: 1,
        client: client.parse().unwrap(),
        model,
        declared_examples: None,
        max_steps: None,
    }
}

/// Every architecture on a shape that it takes.
pub(super) fn every_architecture() -> Vec<Job> {
    let image: &[usize] = &[1, 28, 28];
    let jobs = vec![
        job("logistic", &[13], 2),
        job("mlp", &[3, 4], 5),
        job("2nn", image, 10),
        job("small-cnn", image, 10),
        job("mcmahan-cnn", image, 10),
        job("lenet", &[3, 32, 32], 10),
        job("resnet8-gn", &[3, 16, 16], 7),
        job("sequential", &[2, 9, 9], 6),
    ];
    let names: BTreeSet<_> = jobs.iter().map(|job| job.model.architecture.name()).collect();
    assert_eq!(names.len(), 8);
    assert_eq!(Architecture::Resnet8Gn.name(), "resnet8-gn");
    jobs
}

/// `count` examples around one random centre per class, ±`spread`.
pub(super) fn blobs(model: &tributary_common::job::Model, count: usize, spread: f32) -> Shard {
    let mut stream = Stream::new(3, Purpose::Synthetic, 0, "blobs");
    let row = model.inputs.iter().product::<usize>();
    let mut uniform = |bound: f32| (stream.random::<f32>() - 0.5) * 2.0 * bound;
    let centres: Vec<f32> = (0..model.classes * row).map(|_| uniform(1.0)).collect();
    let labels: Vec<usize> = (0..count).map(|example| example % model.classes).collect();
    let features = labels
        .iter()
        .flat_map(|label| &centres[label * row..(label + 1) * row])
        .map(|value| value + uniform(spread))
        .collect();
    let labels = labels.iter().map(|label| *label as i64).collect();
    Shard::whole(Arc::new(Split { features, labels, groups: Vec::new() }))
}

fn go() -> AtomicBool {
    AtomicBool::new(false)
}

fn trainers() -> [Box<dyn Trainer>; 2] {
    [Box::new(TorchTrainer::new()), Box::new(ArithmeticTrainer)]
}

#[test]
fn what_does_not_fit_is_refused_in_words() {
    let job = job("logistic", &[4], 3);
    let good = blobs(&job.model, 9, 0.1);
    let with = |change: &dyn Fn(&mut Split)| {
        let mut examples = Split::clone(&good.examples);
        change(&mut examples);
        Shard { examples: Arc::new(examples), ..good.clone() }
    };
    for mut trainer in trainers() {
        let mut refusal = |task: &Task, shard: &Shard| {
            let trained = trainer.train(task, shard, &go()).unwrap_err();
            let evaluated = trainer.evaluate(&task.job, &task.model, shard);
            if trained == TrainError::NoExamples {
                assert_eq!(evaluated, Ok(Metrics::default()));
            } else {
                assert_eq!(evaluated, Err(trained.clone()));
            }
            trained.to_string()
        };
        let fine = task(job.clone(), "a");
        let nothing = Shard { indices: Arc::new([]), ..good.clone() };
        assert!(refusal(&fine, &nothing).contains("no training examples"));
        let other_shape = with(&|examples| examples.features.truncate(27));
        assert_eq!(
            refusal(&fine, &other_shape),
            "an example has 3 values, but the job says [model] inputs = [4]"
        );
        for label in [3, -1, i64::MIN] {
            let refused = refusal(&fine, &with(&|examples| examples.labels[2] = label));
            assert!(refused.starts_with(&format!("example 2 has label {label}, but")), "{refused}");
            assert!(refused.ends_with("classes = 3 (labels 0 to 2)"), "{refused}");
        }
        let short = with(&|examples| examples.features.truncate(35));
        assert!(refusal(&fine, &short).contains("9 labels, but 35 features"));
        let outside = Shard { indices: Arc::new([0, 9]), ..good.clone() };
        assert!(refusal(&fine, &outside).contains("names example 9, but there are 9"));
        let other_model = Task { model: Arc::new(vec![0.0; 14]), ..fine.clone() };
        assert!(refusal(&other_model, &good).contains("has 14 parameters"));
        let mut impossible = job.clone();
        impossible.model.classes = 1;
        let impossible = Task { job: Arc::new(impossible), ..fine.clone() };
        assert!(refusal(&impossible, &good).contains("classes = 1"));
        trainer.train(&fine, &good, &go()).unwrap();
    }
}

#[test]
fn a_set_stop_cancels_both() {
    let job = job("logistic", &[4], 3);
    let shard = blobs(&job.model, 9, 0.1);
    let stopped = AtomicBool::new(true);
    for mut trainer in trainers() {
        let refused = trainer.train(&task(job.clone(), "a"), &shard, &stopped);
        assert_eq!(refused, Err(TrainError::Cancelled));
    }
}

#[test]
fn arithmetic_depends_on_all_that_training_depends_on() {
    let shape = job("logistic", &[4], 3);
    let shard = blobs(&shape.model, 9, 0.1);
    let base = task(shape.clone(), "a");
    let train = |task: &Task, shard: &Shard| ArithmeticTrainer.train(task, shard, &go()).unwrap();
    let update = train(&base, &shard);
    assert_eq!(update, train(&base, &shard));
    assert_eq!((update.delta.len(), update.examples), (15, 9));
    let mut other_seed = shape.clone();
    other_seed.seed = 8;
    let mut other_model = base.model.to_vec();
    other_model[0] += 1.0;
    let others = [
        Task { round: 2, ..base.clone() },
        Task { client: "b".parse().unwrap(), ..base.clone() },
        Task { job: Arc::new(other_seed), ..base.clone() },
        Task { model: Arc::new(other_model), ..base.clone() },
    ];
    assert!(others.iter().all(|other| train(other, &shard).delta != update.delta));
    let part = Shard { indices: Arc::new([0, 1]), ..shard.clone() };
    assert_ne!(train(&base, &part).delta, update.delta);
}

#[test]
fn arithmetic_sums_have_the_shape_of_sums_of_gradients() {
    let mut job = job("logistic", &[4], 3);
    (job.train.local_epochs, job.train.local_steps) = (None, Some(1));
    (job.train.batch_size, job.train.sampling_rate) = (0, Some(0.5));
    let table = "unit = 'example'\nmechanism = 'distributed'\nnoise_multiplier = 1.0\nclip_norm = 0.01\n\
                 delta = 1e-5\nmax_epsilon = 9.0\nexpected_batch_size = 4.0\n";
    job.privacy = Some(toml::from_str(table).unwrap());
    let shard = blobs(&job.model, 8, 0.1);
    let task = task(job, "a");
    let update = ArithmeticTrainer.train(&task, &shard, &go()).unwrap();
    assert_eq!((update.examples, update.loss), (1, None));
    let norm = update.delta.iter().map(|value| value * value).sum::<f32>().sqrt();
    assert!(norm > 0.0 && norm <= 4.0 * 0.01 * 1.0001, "{norm}");
}

#[test]
fn arithmetic_evaluates_to_counts_that_fit_together() {
    let job = job("logistic", &[4], 3);
    let shard = blobs(&job.model, 9, 0.1);
    let task = task(job.clone(), "a");
    let metrics = ArithmeticTrainer.evaluate(&job, &task.model, &shard).unwrap();
    assert_eq!((metrics.examples, metrics.correct, metrics.loss()), (9, 7, Some(0.5)));
    assert_eq!(metrics.confusion.iter().flatten().sum::<u64>(), 9);
    assert_eq!((0..3).map(|class| metrics.confusion[class * 4].unwrap()).sum::<u64>(), 7);
}
