//! The join token: what an operator hands to a hospital so that its node can enrol once.
//!
//! Text form: `tributary1.` and base64url, without padding, of
//! `secret (32 bytes) | length of the name (1 byte) | name | authority certificate (PEM) | check (4 bytes)`,
//! where the check is the start of the BLAKE3 digest of all before it. It finds a token that was cut or
//! mistyped; it authenticates nothing.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::digest::Digest;
use crate::ids::NodeName;

const PREFIX: &str = "tributary1.";
const SECRET_BYTES: usize = 32;
const CHECK_BYTES: usize = 4;
/// Longest text that is looked at; a token has about 1,000 characters.
const TEXT_BYTES: usize = 32 * 1024;

/// A one-time permission to enrol a node of one name with one coordinator.
///
/// It carries the certificate of the coordinator's authority, so that already the first connection is
/// authenticated. Whoever has the text can enrol under the name: it travels on a private channel.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// 32 random bytes that the coordinator knows by their digest.
    pub secret: [u8; SECRET_BYTES],
    /// The name that the node will have.
    pub node: NodeName,
    /// The certificate of the coordinator's authority, in PEM.
    pub authority_pem: String,
}

/// Why a text is not a join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is not a join token: {0}")]
pub struct TokenError(&'static str);

impl JoinToken {
    /// The digest under which a coordinator stores the token.
    pub fn secret_digest(&self) -> Digest {
        Digest::of(&self.secret)
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.node.as_str().as_bytes();
        let mut bytes =
            Vec::with_capacity(SECRET_BYTES + 1 + name.len() + self.authority_pem.len() + CHECK_BYTES);
        bytes.extend_from_slice(&self.secret);
        bytes.push(u8::try_from(name.len()).map_err(|_| fmt::Error)?); // a name has at most 63 bytes
        bytes.extend_from_slice(name);
        bytes.extend_from_slice(self.authority_pem.as_bytes());
        bytes.extend_from_slice(&check(&bytes));
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("node", &self.node).finish_non_exhaustive()
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    /// Reads a token. White space in it, as a mail program's line breaks leave it, does not matter.
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let damaged = || TokenError("it is cut off or altered; copy the whole line again");
        if text.len() > TEXT_BYTES {
            return Err(TokenError("it is far too long"));
        }
        let text: String = text.split_ascii_whitespace().collect();
        let body = text.strip_prefix(PREFIX).ok_or(TokenError("it does not start with \"tributary1.\""))?;
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| damaged())?;
        let (content, found) = bytes.split_last_chunk::<CHECK_BYTES>().ok_or_else(damaged)?;
        if *found != check(content) {
            return Err(damaged());
        }
        let (secret, rest) = content.split_first_chunk::<SECRET_BYTES>().ok_or_else(damaged)?;
        let (name_bytes, rest) = rest.split_first().ok_or_else(damaged)?;
        let (name, pem) = rest.split_at_checked(usize::from(*name_bytes)).ok_or_else(damaged)?;
        let name = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok());
        let pem = std::str::from_utf8(pem).ok().filter(|pem| pem.starts_with("-----BEGIN CERTIFICATE-----"));
        Ok(Self {
            secret: *secret,
            node: name.ok_or(TokenError("the node's name in it is not valid"))?,
            authority_pem: pem.ok_or(TokenError("the authority's certificate in it is not PEM"))?.to_owned(),
        })
    }
}

fn check(content: &[u8]) -> [u8; CHECK_BYTES] {
    let [a, b, c, d, ..] = Digest::of(content).0;
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PEM: &str = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";

    fn token(secret: [u8; 32]) -> JoinToken {
        JoinToken { secret, node: "st.mary_2".parse().unwrap(), authority_pem: PEM.to_owned() }
    }

    #[test]
    fn debug_output_does_not_show_the_secret() {
        let shown = format!("{:?}", token([0xab; 32]));
        assert_eq!(shown, r#"JoinToken { node: NodeName("st.mary_2"), .. }"#);
    }

    #[test]
    fn a_token_that_a_mail_program_broke_into_lines_is_read() {
        let token = token([7; 32]);
        let text = token.to_string();
        let (a, b) = text.split_at(60);
        assert_eq!(format!(" {a}\r\n  {b}\n").parse::<JoinToken>().unwrap(), token);
    }

    #[test]
    fn what_is_not_a_token_is_refused_in_one_line() {
        let good = token([7; 32]).to_string();
        let sealed = |content: &[u8]| {
            let mut bytes = content.to_vec();
            bytes.extend_from_slice(&check(content));
            format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
        };
        let named = |name: &[u8], pem: &[u8]| {
            sealed(&[&[7; 32], [u8::try_from(name.len()).unwrap()].as_slice(), name, pem].concat())
        };
        for (bad, why) in [
            (String::new(), "it does not start with"),
            ("hello".to_owned(), "it does not start with"),
            (good.replacen("tributary1", "tributary2", 1), "it does not start with"),
            (good[..good.len() - 1].to_owned(), "cut off or altered"),
            (good[..50].to_owned(), "cut off or altered"),
            (PREFIX.to_owned(), "cut off or altered"),
            (format!("{good}="), "cut off or altered"),
            (sealed(&[7; 32]), "cut off or altered"),
            (sealed(&[[7; 32].as_slice(), &[200, b'a']].concat()), "cut off or altered"),
            (named(b"A", PEM.as_bytes()), "name"),
            (named(b"\xff", PEM.as_bytes()), "name"),
            (named(b"a", b"no certificate"), "PEM"),
            ("x".repeat(TEXT_BYTES + 1), "too long"),
        ] {
            let message = bad.parse::<JoinToken>().unwrap_err().to_string();
            assert!(
                message.starts_with("this is not a join token: ") && message.contains(why),
                "{bad}: {message}"
            );
            assert!(!message.contains('\n'));
        }
    }

    proptest! {
        #[test]
        fn tokens_read_back(secret: [u8; 32], node in "[a-z0-9][a-z0-9._-]{0,62}", rest in "\\PC{0,900}") {
            let authority_pem = format!("{PEM}{rest}");
            let token = JoinToken { secret, node: node.parse().unwrap(), authority_pem };
            prop_assert_eq!(token.to_string().parse::<JoinToken>().unwrap(), token);
        }

        #[test]
        fn an_altered_token_is_never_read_as_another(secret: [u8; 32], at in 11usize..300, to in "[A-Za-z0-9_-]") {
            let token = token(secret);
            let mut text = token.to_string();
            prop_assume!(at < text.len() && text[at..=at] != to);
            text.replace_range(at..=at, &to);
            prop_assert!(text.parse::<JoinToken>().is_err());
        }
    }
}
