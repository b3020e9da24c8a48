//! Downloads against a small HTTP server on this machine that misbehaves on demand.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use flate2::Compression;
use flate2::write::GzEncoder;
use tempfile::TempDir;

use super::*;

/// What the server does with one request.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Answer {
    /// Serves the file, from the offset asked for.
    Serve,
    /// Serves the whole file, whatever range was asked for.
    IgnoreRange,
    /// Announces the whole file, and closes after so many bytes.
    CloseAfter(usize),
    /// As `CloseAfter`, without announcing a length.
    CloseUnannounced(usize),
    /// Only a status.
    Status(u16),
    /// A length beyond every bound.
    Oversized,
    /// Bytes without end and without an announced length.
    Endless,
}

/// A server of one body, and the offsets that were asked for.
struct Mirror {
    url: String,
    offsets: Arc<Mutex<Vec<u64>>>,
}

/// Serves `body` under every name; request k gets `answers[k]`, later ones the last.
fn mirror(body: Vec<u8>, answers: Vec<Answer>) -> Mirror {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/mnist/", listener.local_addr().unwrap());
    let offsets = Arc::new(Mutex::new(Vec::new()));
    let log = offsets.clone();
    std::thread::spawn(move || {
        for (request, stream) in listener.incoming().enumerate() {
            let answer = answers[request.min(answers.len() - 1)];
            // A client that has enough hangs up: no failure of the server's.
            let _ = serve(stream.unwrap(), &body, answer, &log);
        }
    });
    Mirror { url, offsets }
}

fn serve(mut stream: TcpStream, body: &[u8], answer: Answer, log: &Mutex<Vec<u64>>) -> io::Result<()> {
    let mut offset = 0;
    for line in BufReader::new(stream.try_clone()?).lines() {
        let line = line?.to_ascii_lowercase();
        if let Some(range) = line.strip_prefix("range: bytes=") {
            offset = range.trim_end_matches('-').parse().unwrap();
        }
        if line.is_empty() {
            break;
        }
    }
    log.lock().unwrap().push(offset);
    let start = if answer == Answer::IgnoreRange { 0 } else { offset as usize };
    let end = "Connection: close\r\n\r\n";
    if start > 0 && start >= body.len() {
        return write!(stream, "HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n{end}");
    }
    let rest = &body[start..];
    let status = if start > 0 {
        format!("206 Partial Content\r\nContent-Range: bytes {start}-{}/{}", body.len() - 1, body.len())
    } else {
        "200 OK".to_owned()
    };
    match answer {
        Answer::Status(status) => write!(stream, "HTTP/1.1 {status} Sorry\r\nContent-Length: 0\r\n{end}"),
        Answer::Oversized => write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n{end}"),
        Answer::Endless => {
            write!(stream, "HTTP/1.1 200 OK\r\n{end}")?;
            loop {
                stream.write_all(&[0; 4096])?;
            }
        }
        Answer::CloseUnannounced(bytes) => {
            write!(stream, "HTTP/1.1 {status}\r\n{end}")?;
            stream.write_all(&rest[..bytes.min(rest.len())])
        }
        Answer::Serve | Answer::IgnoreRange | Answer::CloseAfter(_) => {
            write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{end}", rest.len())?;
            let most = if let Answer::CloseAfter(bytes) = answer { bytes } else { rest.len() };
            stream.write_all(&rest[..most.min(rest.len())])
        }
    }
}

/// A content that gzip cannot shorten, its gzip file, and its pin.
fn pinned() -> (Vec<u8>, Pinned) {
    let mut content = vec![0; 300_000];
    blake3::Hasher::new().update(b"fetch").finalize_xof().fill(&mut content);
    let sha256: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
    let pin = Pinned { name: "a.gz", content_bytes: content.len() as u64, sha256: sha256.leak() };
    (gzip(&content), pin)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn get(url: &str, into: &Path, pin: Pinned) -> (Result<(), FetchError>, Vec<FetchProgress>) {
    let mut seen = Vec::new();
    let agent = agent(Agent::config_builder().proxy(None));
    let result = fetch(&agent, url, into, &[pin], Duration::from_millis(1), &mut |step| seen.push(step));
    if let Err(error) = &result {
        let line = error.to_string();
        eprintln!("fetch | {line}");
        assert!(!line.contains('\n'), "{line}");
    }
    (result, seen)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_file_is_fetched_once_and_verified() {
    let (body, pin) = pinned();
    let mirror = mirror(body.clone(), vec![Answer::Serve]);
    let folder = TempDir::new().unwrap();
    let into = folder.path().join("new/folder");
    let (result, seen) = get(&mirror.url, &into, pin);
    result.unwrap();
    assert_eq!(std::fs::read(into.join("a.gz")).unwrap(), body);
    assert_eq!(names(&into), ["a.gz"]);
    let bytes = body.len() as u64;
    let whole = FetchProgress::Receiving { file: "a.gz", received_bytes: bytes, total_bytes: Some(bytes) };
    assert!(seen.contains(&whole), "{seen:?}");
    assert_eq!(seen.last(), Some(&FetchProgress::Verified { file: "a.gz" }));
    let (result, seen) = get(&mirror.url, &into, pin);
    result.unwrap();
    assert_eq!(seen, [FetchProgress::Present { file: "a.gz" }]);
    assert_eq!(*mirror.offsets.lock().unwrap(), [0]);

    // A file that went bad on disk is fetched anew.
    std::fs::write(into.join("a.gz"), gzip(b"something else")).unwrap();
    get(&mirror.url, &into, pin).0.unwrap();
    assert_eq!(std::fs::read(into.join("a.gz")).unwrap(), body);
}

#[test]
fn a_broken_download_resumes_where_it_stopped() {
    let (body, pin) = pinned();
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("a.gz.part"), &body[..1000]).unwrap();
    let answers =
        vec![Answer::CloseAfter(2000), Answer::Status(503), Answer::CloseUnannounced(500), Answer::Serve];
    let mirror = mirror(body.clone(), answers);
    let (result, seen) = get(&mirror.url, folder.path(), pin);
    result.unwrap();
    assert_eq!(*mirror.offsets.lock().unwrap(), [1000, 3000, 3000, 3500]);
    assert_eq!(names(folder.path()), ["a.gz"]);
    assert_eq!(std::fs::read(folder.path().join("a.gz")).unwrap(), body);
    let retries = seen.iter().filter(|step| matches!(step, FetchProgress::Retrying { .. })).count();
    assert_eq!(retries, 3, "{seen:?}");
}

#[test]
fn a_mirror_that_ignores_ranges_starts_over() {
    let (body, pin) = pinned();
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("a.gz.part"), &body[..1000]).unwrap();
    let mirror = mirror(body.clone(), vec![Answer::IgnoreRange]);
    get(&mirror.url, folder.path(), pin).0.unwrap();
    assert_eq!(std::fs::read(folder.path().join("a.gz")).unwrap(), body);
}

#[test]
fn what_an_earlier_download_left_is_used_or_thrown_away() {
    let (body, pin) = pinned();
    // Complete, but not yet renamed: nothing is left to ask for.
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("a.gz.part"), &body).unwrap();
    get(&mirror(body.clone(), vec![Answer::Serve]).url, folder.path(), pin).0.unwrap();
    assert_eq!(names(folder.path()), ["a.gz"]);
    // Longer than the file, or other bytes than the mirror's: fetched from the start.
    for left in [vec![1; body.len() + 1], vec![1; 1000]] {
        let folder = TempDir::new().unwrap();
        std::fs::write(folder.path().join("a.gz.part"), left).unwrap();
        get(&mirror(body.clone(), vec![Answer::Serve]).url, folder.path(), pin).0.unwrap();
        assert_eq!(std::fs::read(folder.path().join("a.gz")).unwrap(), body);
    }
}

#[test]
fn wrong_content_is_never_kept() {
    let (_, pin) = pinned();
    let same_length = gzip(&vec![7; 300_000]);
    let bomb = gzip(&vec![0; 30_000_000]);
    let cases = [
        (same_length, "not "),
        (bomb, "300000 bytes"),
        (gzip(b"short"), "300000 bytes"),
        (b"<html>no such bucket</html>".to_vec(), "not the gzip file"),
    ];
    for (body, part) in cases {
        let folder = TempDir::new().unwrap();
        let mirror = mirror(body, vec![Answer::Serve]);
        let (result, _) = get(&mirror.url, folder.path(), pin);
        let error = result.unwrap_err();
        assert!(matches!(error, FetchError::WrongContent { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(mirror.offsets.lock().unwrap().len(), 1);
        assert!(names(folder.path()).is_empty());
    }
}

#[test]
fn a_mirror_cannot_fill_the_disk() {
    let (_, pin) = pinned();
    for answer in [Answer::Oversized, Answer::Endless] {
        let folder = TempDir::new().unwrap();
        let (result, _) = get(&mirror(Vec::new(), vec![answer]).url, folder.path(), pin);
        assert!(matches!(result, Err(FetchError::WrongContent { .. })), "{result:?}");
        assert!(names(folder.path()).is_empty());
    }
}

#[test]
fn a_missing_file_is_refused_at_once() {
    let (_, pin) = pinned();
    let folder = TempDir::new().unwrap();
    let mirror = mirror(Vec::new(), vec![Answer::Status(404)]);
    let error = get(&mirror.url, folder.path(), pin).0.unwrap_err();
    assert!(error.to_string().contains("/mnist/a.gz: the mirror answers 404"), "{error}");
    assert_eq!(mirror.offsets.lock().unwrap().len(), 1);
}

#[test]
fn a_server_that_is_offline_or_breaks_off_ends_in_one_line() {
    let (body, pin) = pinned();
    let folder = TempDir::new().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (result, seen) = get(&format!("http://{free}"), folder.path(), pin);
    let line = result.unwrap_err().to_string();
    assert!(line.contains("after 5 attempts") && line.contains("check the network"), "{line}");
    assert_eq!(seen.len(), 4);

    let mirror = mirror(body.clone(), vec![Answer::CloseAfter(100)]);
    let error = get(&mirror.url, folder.path(), pin).0.unwrap_err();
    assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
    // What arrived waits for the next call.
    assert_eq!(std::fs::read(folder.path().join("a.gz.part")).unwrap(), body[..500]);
}

#[test]
fn the_pins_are_those_of_the_original_files() {
    let Some(folder) = std::env::var_os("TRIBUTARY_DATA") else {
        eprintln!("skipped: TRIBUTARY_DATA is not set (a folder with mnist/)");
        return;
    };
    for pin in &MNIST {
        let path = Path::new(&folder).join("mnist").join(pin.name);
        assert!(matches!(inspect(&path, pin).unwrap(), Content::Right), "{}", pin.name);
        assert!(std::fs::metadata(&path).unwrap().len() <= pin.most_bytes());
    }
}
