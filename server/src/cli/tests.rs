//! The command line, and the coordinator that it starts.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use clap::CommandFactory as _;
use tonic::Code;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use tributary_common::digest::Digest;
use tributary_common::record::{Participation, RoundRecord};
use tributary_proto::admin as wire;
use tributary_proto::coordinator::FetchRequest;
use tributary_proto::coordinator::coordinator_client::CoordinatorClient;

use super::*;

fn parse(line: &str) -> Result<Cli, String> {
    let arguments = std::iter::once("tributary-server").chain(line.split_whitespace());
    Cli::try_parse_from(arguments).map_err(|error| error.to_string())
}

#[test]
fn the_commands_are_as_documented() {
    Cli::command().debug_assert();
    for line in [
        "init there --name fl.example.org --name 192.0.2.1 --listen 127.0.0.1:0",
        "serve --config a.toml --log-format json",
        "token create --name cleveland --valid-hours 48 --config a.toml",
        "nodes list --format json",
        "nodes revoke cleveland",
        "run submit job.toml --initial-model model.safetensors --watch --format json",
        "run list",
        "run show 0123456789abcdef",
        "run watch 0123456789abcdef --format json",
        "run stop 0123456789abcdef",
        "run export 0123456789abcdef --out model.safetensors",
        "backup --out coordinator.zip --config a.toml",
        "restore --from coordinator.zip --dir there",
        "check-config a.toml",
    ] {
        parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
    for (line, why) in [
        ("", "Usage"),
        ("token create", "--name"),
        ("token create --name Cleveland", "node name \"Cleveland\" is not valid"),
        ("token create --name a --valid-hours 0", "0 is not in 1..=720"),
        ("run show 123", "run id \"123\" is not valid"),
        ("init there --listen 7443", "--listen"),
        ("nodes", "Usage"),
    ] {
        let error = parse(line).unwrap_err();
        assert!(error.contains(why), "{line}: {error}");
    }
    let help = Cli::command().render_long_help().to_string();
    assert!(help.contains("Exit codes:") && help.contains("2  wrong usage"), "{help}");
}

fn new_site(dir: &Path) -> ServerConfig {
    init::init(dir, &["localhost".to_owned()], "127.0.0.1:0".parse().unwrap()).unwrap();
    ServerConfig::load(&dir.join(CONFIG_FILE)).unwrap()
}

#[test]
fn init_makes_a_folder_once() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("site");
    let config = new_site(&dir);
    assert_eq!(config.data_dir, std::path::absolute(dir.join("data")).unwrap());
    assert_eq!(std::fs::metadata(&config.data_dir).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(
        config.data_dir.join("authority/authority.pem").exists() && config.data_dir.join("store").exists()
    );
    assert!(
        show::config(&config).contains("nodes dial         https://localhost:0"),
        "{}",
        show::config(&config)
    );

    let listen = "127.0.0.1:0".parse().unwrap();
    let again = init::init(&dir, &["localhost".to_owned()], listen).unwrap_err();
    assert!(again.code == 2 && again.line.contains("exists already"), "{again:?}");
    let elsewhere = folder.path().join("other");
    let wrong = init::init(&elsewhere, &["not a name".to_owned()], listen).unwrap_err();
    assert!(wrong.code == 2 && !elsewhere.exists(), "{wrong:?}");
}

#[test]
fn refusals_have_an_exit_code() {
    let code = |status: tonic::Status| Failure::from(status).code;
    assert_eq!(code(tonic::Status::invalid_argument("the job")), 2);
    assert_eq!(code(tonic::Status::not_found("the run")), 1);
    let missing = ConfigArg { path: "/nowhere/server.toml".into() }.load().unwrap_err();
    assert!(missing.code == 2 && missing.line.contains("No such file"), "{missing:?}");
}

#[test]
fn lists_are_readable_for_people_and_machines() {
    let node = wire::Node {
        name: "cleveland".to_owned(),
        identity: "0123456789abcdef".to_owned(),
        connected: true,
        revoked: false,
        enrolled_unix_seconds: 0,
        expires_unix_seconds: 86_400,
        role: "trainer".to_owned(),
    };
    let away = wire::Node { name: "va".to_owned(), connected: false, role: String::new(), ..node.clone() };
    let text = show::nodes(Format::Text, &[node.clone(), away.clone()]);
    assert!(text.contains("cleveland  connected  trainer  01234567  1970-01-01 00:00 UTC"), "{text}");
    assert!(text.contains("va         away       –        01234567"), "{text}");
    let json = show::nodes(Format::Json, &[node, away]);
    let objects: Vec<serde_json::Value> =
        json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&objects[0]["role"], &objects[1]["role"]), (&"trainer".into(), &serde_json::Value::Null));

    let run = wire::Run {
        run: 7,
        name: "test".to_owned(),
        state_json: r#"{"state":"failed","reason":{"why":"below-minimum","accepted":1,"minimum":2}}"#
            .to_owned(),
        published: 1,
        rounds: 3,
        submitted_unix_milliseconds: 60_000,
        model: vec![0; 32],
    };
    let text = show::runs(Format::Text, std::slice::from_ref(&run)).unwrap();
    assert!(
        text.contains("0000000000000007  test  1/3     1970-01-01 00:01 UTC  failed: 1 of at least 2"),
        "{text}"
    );
    let json: serde_json::Value =
        serde_json::from_str(&show::runs(Format::Json, std::slice::from_ref(&run)).unwrap()).unwrap();
    assert_eq!((&json["run"], &json["state"]), (&"0000000000000007".into(), &"failed".into()));
    assert!(
        show::runs(Format::Text, &[wire::Run { model: vec![], state_json: "{".to_owned(), ..run.clone() }])
            .is_err()
    );

    let accepted = Participation::Accepted { digest: None, examples: 1, bytes: 24 };
    let record = RoundRecord {
        round: 1,
        attempt: 1,
        started: tributary_common::time::Time(0),
        ended: tributary_common::time::Time(1500),
        eligible: 1,
        cohort: [("a".parse().unwrap(), accepted)].into(),
        bytes_down: 24,
        bytes_up: 24,
        outcome: tributary_common::record::RoundOutcome::Published { model: Digest([0; 32]) },
        spent: false,
        summed: None,
    };
    let shown = wire::ShowRunResponse {
        run: Some(run),
        job_toml: "name = \"test\"".to_owned(),
        round_records_json: vec![serde_json::to_string(&record).unwrap()],
        evaluation_records_json: Vec::new(),
    };
    let text = show::run(Format::Text, &shown).unwrap();
    assert!(
        text.contains("round 1/3  accuracy –") && text.contains("failed: 1 of") && text.ends_with("\"test\""),
        "{text}"
    );
    let json: serde_json::Value = serde_json::from_str(&show::run(Format::Json, &shown).unwrap()).unwrap();
    assert_eq!(json["rounds_ended"][0]["round"], 1);
}

#[tokio::test]
async fn the_coordinator_starts_serves_and_stops() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = new_site(folder.path());
    config.drain_seconds = 5;
    for _ in 0..2 {
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let running = config.clone();
        let serving = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            crate::serve::serve(&running, stopped).await
        });
        let address_file = config.data_dir.join("address");
        let address = loop {
            match std::fs::read_to_string(&address_file) {
                Ok(text) => break text.trim().to_owned(),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
            assert!(!serving.is_finished(), "{:?}", serving.await);
        };
        // A second one on the same folder is refused.
        let second = crate::serve::serve(&config, std::future::pending()).await.unwrap_err();
        assert!(second.to_string().contains("in use"), "{second}");

        let mut admin = crate::admin::connect(&config.admin_socket()).await.unwrap();
        assert!(admin.list_nodes(wire::ListNodesRequest {}).await.unwrap().into_inner().nodes.is_empty());
        // A backup of it while it runs; and of it below, stopped.
        let arg = ConfigArg { path: folder.path().join(CONFIG_FILE) };
        backup::backup(folder.path().join(format!("{address}.zip")), arg).await.unwrap();
        // Whoever is not enrolled gets no further than TLS.
        let authority = std::fs::read_to_string(config.data_dir.join("authority/authority.pem")).unwrap();
        let tls =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority)).domain_name("localhost");
        let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap().tls_config(tls).unwrap();
        let mut stranger = CoordinatorClient::new(endpoint.connect().await.unwrap());
        let refused = stranger.fetch(FetchRequest::default()).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);

        stop.send(()).unwrap();
        drop((admin, stranger));
        tokio::time::timeout(Duration::from_secs(20), serving).await.unwrap().unwrap().unwrap();
        assert!(!address_file.exists() && !config.admin_socket().exists());
    }
    let arg = || ConfigArg { path: folder.path().join(CONFIG_FILE) };
    backup::backup(folder.path().join("stopped.zip"), arg()).await.unwrap();
    let again = backup::backup(folder.path().join("stopped.zip"), arg()).await.unwrap_err();
    assert!(again.code == 1 && again.line.contains("exists already"), "{again:?}");
    let mut backups = 0;
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let from = entry.unwrap().path();
        if from.extension().is_some_and(|extension| extension == "zip") {
            let dir = from.with_extension("restored");
            let told = backup::restore(&from, &dir).unwrap();
            assert!(
                told.contains("tokens                   none") && told.contains("Revoke again"),
                "{told}"
            );
            ServerConfig::load(&dir.join(CONFIG_FILE)).unwrap();
            backups += 1;
        }
    }
    assert_eq!(backups, 3);
    let unknown = ServerConfig { data_dir: folder.path().join("nowhere"), ..config };
    let error = crate::serve::serve(&unknown, std::future::pending()).await.unwrap_err().to_string();
    assert!(error.contains("nowhere"), "{error}");
}
