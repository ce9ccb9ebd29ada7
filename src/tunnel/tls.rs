//! TLS between a network and the gate: authenticates peers, and decides which are let in.
//!
//! ```text
//!  TCP ─▶ TLS 1.3, both keys verified ─▶ introduction: proofs of the mesh key ─▶ ZMTP
//! ```
//!
//! Nodes authenticate each other by raw public keys (RFC 7250): Ed25519 keys, whose bytes are their
//! node ids. Sessions are never resumed, since the holder of a removed key could resume one. The
//! first bytes inside TLS, sent by both sides at once, are the introduction:
//!
//! ```text
//!  "pbus" · version 1 · number of proofs n · n × 32 bytes
//! ```
//!
//! A proof is an HMAC-SHA256 under a mesh key over the maker's role and 32 bytes that TLS exports
//! for this one connection (RFC 8446, section 7.5), so it can't be reflected, replayed, or relayed
//! by a man in the middle. A node sends a proof for each of its keys, and requires one for any of
//! them. Each side answers with a byte: 0 if the other is let in, 1 if it proved no key, 2 if its
//! public key is not trusted. ZMTP follows.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer,
    UnixTime,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, ConnectionCommon, DigitallySignedStruct, DistinguishedName,
    Error, PeerIncompatible, ServerConfig, SignatureScheme,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::Refusal;
use super::ended::Ended;
use super::zmtp::TLS_HANDSHAKE;
use crate::identity::{Identity, NodeId};
use crate::trust::{LetIn, PROOF_LEN, Proof, Role};

const ALPN: &[u8] = b"peerbus/1";
const EXPORTER: &[u8] = b"EXPORTER-peerbus-mesh";
const MAGIC: &[u8] = b"pbus\x01";
/// The maximum number of proofs from a peer, and so of mesh keys of a node.
pub(crate) const MAX_PROOFS: usize = 8;

/// The SubjectPublicKeyInfo of an Ed25519 key (RFC 8410), without the key.
const SPKI_HEAD: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0];

/// The TLS configuration of a node.
pub(crate) struct Tls {
    me: NodeId,
    connector: TlsConnector,
    acceptor: TlsAcceptor,
    let_in: LetIn,
}

impl Tls {
    pub(crate) fn new(identity: &Identity, let_in: LetIn) -> Self {
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(identity.pkcs8().to_vec()));
        let key = ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(der.secret_der()))
            .expect("an identity is an Ed25519 key");
        Self::with_key(identity.node_id(), key, let_in)
    }

    fn with_key(me: NodeId, key: Arc<dyn SigningKey>, let_in: LetIn) -> Self {
        let provider = Arc::new(provider());
        let spki = [&SPKI_HEAD[..], me.as_bytes()].concat();
        let certified = Arc::new(CertifiedKey::new(vec![CertificateDer::from(spki)], key));
        let verifier = Arc::new(RawKeys(provider.signature_verification_algorithms));
        let only_13 = "the provider has suites for TLS 1.3";

        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .expect(only_13)
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(
                certified.clone(),
            )));
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        client.alpn_protocols = vec![ALPN.to_vec()];

        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .expect(only_13)
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(certified)));
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![ALPN.to_vec()];

        Self {
            me,
            connector: TlsConnector::from(Arc::new(client)),
            acceptor: TlsAcceptor::from(Arc::new(server)),
            let_in,
        }
    }

    /// Opens a connection up to the first byte of ZMTP; returns the peer's id.
    pub(super) async fn open(
        &self,
        tcp: TcpStream,
        dialled: bool,
    ) -> Result<(TlsStream<TcpStream>, NodeId), Ended> {
        let (mut stream, role, opened) = if dialled {
            // No name is sent or checked: the key is the peer's identity.
            let nobody = ServerName::try_from("peerbus").expect("it is a name");
            let tls = self.connector.connect(nobody, tcp).await.map_err(failed)?;
            let opened = Opened::of(tls.get_ref().1)?;
            (TlsStream::from(tls), Role::Dialler, opened)
        } else {
            let mut first = [0];
            if tcp.peek(&mut first).await? == 1 && first[0] != TLS_HANDSHAKE {
                return Err(Refusal::ClearText.into());
            }
            let tls = self.acceptor.accept(tcp).await.map_err(failed)?;
            let opened = Opened::of(tls.get_ref().1)?;
            (TlsStream::from(tls), Role::Listener, opened)
        };
        let verdict = self.introduce(&mut stream, role, &opened).await?;
        stream.write_all(&[verdict as u8]).await?;
        stream.flush().await?;
        match verdict {
            Verdict::NoMeshKey if matches!(self.let_in, LetIn::ThisHost(_)) => {
                return Err(Refusal::HostKey.into());
            }
            Verdict::NoMeshKey => return Err(Refusal::MeshKey.into()),
            Verdict::UnknownKey => return Err(Refusal::UnknownKey.into()),
            Verdict::Welcome => {}
        }
        let mut theirs = [0];
        stream.read_exact(&mut theirs).await.map_err(failed)?;
        match theirs {
            [0] => Ok((stream, opened.peer)),
            _ => Err(Refusal::TurnedAway.into()),
        }
    }

    /// Returns true if the holder of this public key is currently let in.
    pub(super) fn trusts(&self, id: &NodeId) -> bool {
        *id == self.me || self.let_in.trusts(id)
    }

    /// Exchanges introductions; returns the verdict on the peer.
    async fn introduce(
        &self,
        stream: &mut TlsStream<TcpStream>,
        role: Role,
        opened: &Opened,
    ) -> Result<Verdict, Ended> {
        let keys = self.let_in.mesh_keys();
        let exported = &opened.exported;
        let mut introduction = MAGIC.to_vec();
        introduction.push(keys.len() as u8);
        for key in keys.iter() {
            introduction.extend_from_slice(&key.prove(role, exported));
        }
        stream.write_all(&introduction).await?;
        stream.flush().await?;

        let mut head = [0; MAGIC.len() + 1];
        stream.read_exact(&mut head).await.map_err(failed)?;
        let (magic, count) = head.split_at(MAGIC.len());
        let count = usize::from(count[0]);
        if magic != MAGIC || count > MAX_PROOFS {
            return Err(Refusal::Introduction.into());
        }
        let mut proofs: [Proof; MAX_PROOFS] = [[0; PROOF_LEN]; MAX_PROOFS];
        stream.read_exact(proofs[..count].as_flattened_mut()).await.map_err(failed)?;
        let theirs = match role {
            Role::Dialler => Role::Listener,
            Role::Listener => Role::Dialler,
        };
        let proves = |proof| keys.iter().any(|key| key.verifies(theirs, exported, proof));
        Ok(match &self.let_in {
            LetIn::MeshKey(_) | LetIn::ThisHost(_) if !proofs[..count].iter().any(proves) => {
                Verdict::NoMeshKey
            }
            _ if !self.trusts(&opened.peer) => Verdict::UnknownKey,
            _ => Verdict::Welcome,
        })
    }
}

/// One side's verdict on the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Welcome = 0,
    NoMeshKey = 1,
    UnknownKey = 2,
}

/// The result of a TLS handshake.
struct Opened {
    peer: NodeId,
    exported: [u8; 32],
}

impl Opened {
    fn of<Side>(tls: &ConnectionCommon<Side>) -> Result<Self, Refusal> {
        if tls.alpn_protocol() != Some(ALPN) {
            return Err(Refusal::Tls);
        }
        let certificate = tls.peer_certificates().and_then(<[_]>::first).ok_or(Refusal::Tls)?;
        let key = public_key(certificate).ok_or(Refusal::Tls)?;
        // The signature proves nothing if anyone can sign for the key.
        let peer = NodeId::checked(key).map_err(|_| Refusal::WeakKey)?;
        let exported =
            tls.export_keying_material([0; 32], EXPORTER, Some(b"")).map_err(|_| Refusal::Tls)?;
        Ok(Self { peer, exported })
    }
}

/// Maps the errors of a closing peer to a refusal.
fn failed(error: std::io::Error) -> Ended {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, InvalidData, UnexpectedEof};
    match error.kind() {
        UnexpectedEof | ConnectionReset | BrokenPipe => Refusal::EndedEarly.into(),
        InvalidData => {
            tracing::debug!(%error, "a TLS handshake failed");
            Refusal::Tls.into()
        }
        _ => error.into(),
    }
}

/// The provider, with the cheapest suite first: a link's keys live only as long as its nodes, and
/// X25519 gives 128 bits anyway.
fn provider() -> CryptoProvider {
    use ring::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    CryptoProvider {
        cipher_suites: vec![
            TLS13_AES_128_GCM_SHA256,
            TLS13_AES_256_GCM_SHA384,
            TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..ring::default_provider()
    }
}

fn public_key(spki: &[u8]) -> Option<[u8; NodeId::LEN]> {
    spki.strip_prefix(&SPKI_HEAD)?.try_into().ok()
}

/// Verifies that a peer holds its key. The key is accepted or refused later, where the peer can be
/// notified.
#[derive(Debug)]
struct RawKeys(WebPkiSupportedAlgorithms);

impl RawKeys {
    fn check_key(&self, key: &CertificateDer<'_>) -> Result<(), Error> {
        match public_key(key) {
            Some(_) => Ok(()),
            None => Err(Error::InvalidCertificate(CertificateError::BadEncoding)),
        }
    }

    fn check_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let spki = SubjectPublicKeyInfoDer::from(key.as_ref());
        verify_tls13_signature_with_raw_key(message, &spki, signature, &self.0)
    }
}

fn never_12() -> Error {
    Error::PeerIncompatible(PeerIncompatible::Tls13RequiredForQuic)
}

impl ServerCertVerifier for RawKeys {
    fn verify_server_cert(
        &self,
        key: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check_key(key).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(never_12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, key, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for RawKeys {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        key: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check_key(key).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(never_12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, key, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
