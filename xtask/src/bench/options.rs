//! What `cargo xtask bench` is asked for.

use std::path::PathBuf;

/// One benchmark.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Bench {
    /// The benches of the workspace; `filter` goes to them as it is.
    Engine {
        filter: Vec<String>,
    },
    Peers(Peers),
    Scale(Scale),
    /// One private step beside Opacus'.
    Privacy {
        /// Python with torch and opacus.
        python: Option<PathBuf>,
    },
    Secagg(Secagg),
    /// Robust rules against attacks.
    Robust {
        /// A simulator that is built already.
        program: Option<PathBuf>,
    },
}

/// `bench secagg`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Secagg {
    /// Sizes of updates that are measured; none for the bench's own.
    pub(crate) dimensions: Vec<String>,
    /// Python with flwr.
    pub(crate) python: Option<PathBuf>,
}

/// `bench peers`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Peers {
    /// Alternated repeats, from 1.
    pub(crate) repeats: u32,
    /// Rounds of each run, from 3.
    pub(crate) rounds: u32,
    /// The models that are trained.
    pub(crate) models: Vec<String>,
    /// Python with the peers' packages.
    pub(crate) python: Option<PathBuf>,
    /// A simulator that is built already.
    pub(crate) program: Option<PathBuf>,
}

/// `bench scale`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Scale {
    /// The model whose time is measured.
    pub(crate) model: String,
    /// Largest cohort that is measured, from 1,000: two points always lie on a line.
    pub(crate) largest: u32,
    /// A simulator that is built already.
    pub(crate) program: Option<PathBuf>,
}

/// Models that peers have too.
const MODELS: [&str; 2] = ["small-cnn", "2nn"];

/// Parses the arguments after `bench`. The error is one line.
pub(crate) fn parse(arguments: &[String]) -> Result<Bench, String> {
    let Some((name, rest)) = arguments.split_first() else {
        return Err("`bench` needs peers, engine, privacy, robust, scale or secagg".to_owned());
    };
    match name.as_str() {
        "engine" => Ok(Bench::Engine { filter: rest.to_vec() }),
        "peers" => peers(rest),
        "privacy" => privacy(rest),
        "robust" => robust(rest),
        "scale" => scale(rest),
        "secagg" => secagg(rest),
        other => Err(format!("`bench` takes peers, engine, privacy, robust, scale or secagg, not `{other}`")),
    }
}

fn peers(arguments: &[String]) -> Result<Bench, String> {
    let mut peers = Peers { repeats: 3, rounds: 8, models: Vec::new(), python: None, program: None };
    each(arguments, |name, value| {
        match name {
            "--repeats" => peers.repeats = number(name, value, 1)?,
            "--rounds" => peers.rounds = number(name, value, 3)?,
            "--model" if MODELS.contains(&value) => peers.models.push(value.to_owned()),
            "--model" => return Err(format!("`--model` is one of {}, not `{value}`", MODELS.join(", "))),
            "--python" => peers.python = Some(value.into()),
            "--program" => peers.program = Some(value.into()),
            other => return Err(format!("`bench peers` does not know `{other}`")),
        }
        Ok(())
    })?;
    if peers.models.is_empty() {
        peers.models = MODELS.map(str::to_owned).to_vec();
    }
    Ok(Bench::Peers(peers))
}

fn scale(arguments: &[String]) -> Result<Bench, String> {
    let mut scale = Scale { model: "small-cnn".to_owned(), largest: 10_000, program: None };
    each(arguments, |name, value| {
        match name {
            "--model" => scale.model = value.to_owned(),
            "--largest" => scale.largest = number(name, value, 1_000)?,
            "--program" => scale.program = Some(value.into()),
            other => return Err(format!("`bench scale` does not know `{other}`")),
        }
        Ok(())
    })?;
    Ok(Bench::Scale(scale))
}

fn robust(arguments: &[String]) -> Result<Bench, String> {
    let mut program = None;
    each(arguments, |name, value| match name {
        "--program" => {
            program = Some(value.into());
            Ok(())
        }
        other => Err(format!("`bench robust` does not know `{other}`")),
    })?;
    Ok(Bench::Robust { program })
}

fn privacy(arguments: &[String]) -> Result<Bench, String> {
    let mut python = None;
    each(arguments, |name, value| match name {
        "--python" => {
            python = Some(value.into());
            Ok(())
        }
        other => Err(format!("`bench privacy` does not know `{other}`")),
    })?;
    Ok(Bench::Privacy { python })
}

fn secagg(arguments: &[String]) -> Result<Bench, String> {
    let mut secagg = Secagg { dimensions: Vec::new(), python: None };
    each(arguments, |name, value| {
        match name {
            "--dimension" => secagg.dimensions.push(number(name, value, 1)?.to_string()),
            "--python" => secagg.python = Some(value.into()),
            other => return Err(format!("`bench secagg` does not know `{other}`")),
        }
        Ok(())
    })?;
    Ok(Bench::Secagg(secagg))
}

/// Calls `take` with each `--name value` or `--name=value`.
fn each(arguments: &[String], mut take: impl FnMut(&str, &str) -> Result<(), String>) -> Result<(), String> {
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.split_once('=') {
            Some((name, value)) => take(name, value)?,
            None => take(argument, rest.next().ok_or_else(|| format!("`{argument}` needs a value"))?)?,
        }
    }
    Ok(())
}

fn number(name: &str, value: &str, least: u32) -> Result<u32, String> {
    let number = value.parse().ok().filter(|number| *number >= least);
    number.ok_or_else(|| format!("`{name}` is a number from {least}, not `{value}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Bench, String> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_read() {
        assert_eq!(parsed("privacy --python=p"), Ok(Bench::Privacy { python: Some("p".into()) }));
        assert_eq!(parsed("engine 2nn"), Ok(Bench::Engine { filter: vec!["2nn".to_owned()] }));
        let Ok(Bench::Peers(peers)) = parsed("peers --repeats 5 --rounds=4 --model 2nn") else { panic!() };
        assert_eq!((peers.repeats, peers.rounds, peers.models), (5, 4, vec!["2nn".to_owned()]));
        let Ok(Bench::Peers(peers)) = parsed("peers") else { panic!() };
        assert_eq!((peers.repeats, peers.rounds, peers.models.len()), (3, 8, 2));
        let Ok(Bench::Scale(scale)) = parsed("scale --model mcmahan-cnn --largest 1000") else { panic!() };
        assert_eq!((scale.model.as_str(), scale.largest), ("mcmahan-cnn", 1000));
        let Ok(Bench::Secagg(secagg)) = parsed("secagg --dimension 100000 --dimension=5 --python p") else {
            panic!()
        };
        assert_eq!((secagg.dimensions, secagg.python), (vec!["100000".into(), "5".into()], Some("p".into())));
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (line, named) in [
            ("", "needs peers, engine, privacy, robust, scale or secagg"),
            ("privacy --rounds 3", "`--rounds`"),
            ("all", "`all`"),
            ("peers --rounds 2", "a number from 3, not `2`"),
            ("peers --repeats", "`--repeats` needs a value"),
            ("peers --model resnet", "small-cnn, 2nn, not `resnet`"),
            ("peers --fast 1", "`--fast`"),
            ("scale --largest x", "not `x`"),
            ("secagg --dimension 0", "a number from 1, not `0`"),
            ("secagg --fast 1", "`--fast`"),
        ] {
            let message = parsed(line).unwrap_err();
            assert!(message.contains(named), "{line}: {message}");
        }
    }
}
