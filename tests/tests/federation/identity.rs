//! Who may speak to a coordinator: the refused ones, what they are told, and what the log says.

use std::path::Path;

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};
use tributary_proto::coordinator::coordinator_client::CoordinatorClient;
use tributary_proto::coordinator::{CoordinatorMessage, Hello, NodeMessage, Role, node_message};
use tributary_tests::{Coordinator, Process, run};

/// Opens a control stream as `node` with an identity, and gives the coordinator's first message.
async fn hello(
    coordinator: &Coordinator,
    identity: Option<Identity>,
    node: &str,
) -> Result<CoordinatorMessage, String> {
    let authority = std::fs::read_to_string(coordinator.scratch("client-0").join("authority.pem")).unwrap();
    let mut tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority)).domain_name("localhost");
    if let Some(identity) = identity {
        tls = tls.identity(identity);
    }
    let url = format!("https://{}", coordinator.address);
    let channel = Channel::from_shared(url).unwrap().tls_config(tls).unwrap().connect().await;
    let words = |error: &dyn std::error::Error| {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        text
    };
    let channel = channel.map_err(|error| words(&error))?;
    let hello = Hello {
        protocol_minimum: 1,
        protocol_maximum: 1,
        software: "test".into(),
        node: node.into(),
        role: Role::Trainer.into(),
    };
    let messages = tokio_stream::iter([NodeMessage { message: Some(node_message::Message::Hello(hello)) }]);
    let stream = CoordinatorClient::new(channel).control(messages).await;
    let mut stream = stream.map_err(|status| words(&status))?.into_inner();
    match stream.message().await {
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err("the stream ended".into()),
        Err(status) => Err(words(&status)),
    }
}

fn identity_in(folder: &Path) -> Identity {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    Identity::from_pem(read("certificate.pem"), read("key.pem"))
}

/// A certificate that says it is `client-0`, signed by somebody else.
fn foreign_identity() -> Identity {
    let authority_key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let mut authority = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
    let uri = "tributary://node/client-0".try_into().unwrap();
    params.subject_alt_names = vec![rcgen::SanType::URI(uri)];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = params.signed_by(&key, &issuer).unwrap();
    Identity::from_pem(certificate.pem(), key.serialize_pem())
}

#[tokio::test]
async fn only_a_live_identity_of_ones_own_is_served_and_the_log_says_who_was_refused() {
    let mut coordinator = Coordinator::start();
    let data = "[data]\nsource = \"synthetic\"\nexamples = 40\ntest_examples = 10\n";
    let config = coordinator.join("client-0", data);
    coordinator.join("client-1", data);
    let own = identity_in(&coordinator.scratch("client-0"));

    let welcome = hello(&coordinator, Some(own.clone()), "client-0").await.expect("a joined node is served");
    assert!(format!("{welcome:?}").contains("Welcome"), "{welcome:?}");

    let mut table = String::new();
    let mut refused = async |case: &str, identity: Option<Identity>, node: &str, words: &str, log: &str| {
        let answer = hello(&coordinator, identity, node).await.expect_err(case);
        assert!(answer.contains(words), "{case}: {answer}");
        coordinator.process().wait_for(log, 1);
        let output = coordinator.process().output();
        let line = output.lines().rfind(|line| line.contains(log)).unwrap_or_default();
        table.push_str(&format!("{case}\n  told: {answer}\n  log:  {line}\n"));
    };
    refused("no certificate", None, "client-0", "certificate", "no client certificate").await;
    refused("a foreign certificate", Some(foreign_identity()), "client-0", "", "its certificate is foreign")
        .await;
    refused("another node's id", Some(own.clone()), "client-1", "is node client-0's", "claims to be").await;

    // Revocation ends the open stream of a running node at once, and it is not let in again.
    let mut node = Process::node(&config, &[]);
    coordinator.process().wait_for("node client-0 connected", 2);
    coordinator.admin(&["nodes", "revoke", "client-0"]);
    assert_eq!(node.wait(), Some(1), "{}", node.output());
    assert!(node.output().contains("revoked"), "{}", node.output());
    let answer = hello(&coordinator, Some(own), "client-0").await.expect_err("revoked");
    assert!(answer.contains("revoked"), "{answer}");
    println!("{table}a revoked certificate\n  told: {answer}");
    let log = coordinator.process().output();
    assert!(log.lines().any(|line| line.contains("WARN") && line.contains("revoked")), "{log}");
}

#[test]
fn a_token_works_once() {
    let coordinator = Coordinator::start();
    let (url, token) = (coordinator.url(), coordinator.token("client-0"));
    let first = coordinator.scratch("first");
    let second = coordinator.scratch("second");
    let join = |dir: &Path, code| {
        let arguments = ["join", "--server", &url, "--token", &token, "--dir", dir.to_str().unwrap()];
        run("tributary-client", &arguments, code)
    };
    join(&first, 0);
    let refused = join(&second, 1);
    let words = String::from_utf8_lossy(&refused.stderr);
    assert!(words.contains("token") && words.trim().lines().count() == 1, "{words}");
}
