//! The client over `async-nats`, used as its own documents do.

use std::time::Duration;

use anyhow::{Context, anyhow};
use async_nats::jetstream::{self, consumer::pull, stream};
use async_nats::{ConnectOptions, ServerAddr};
use bytes::Bytes;
use futures_util::StreamExt;
use peerbus::{BrokerUrl, Credentials};

use super::{Note, PATIENCE, SERVICE, TOPIC};
use crate::bench::tradeoff::actor::Part;
use crate::bench::tradeoff::workload::Pattern;

const GROUP: &str = "workers";

pub(in super::super) struct Client {
    client: async_nats::Client,
    jetstream: jetstream::Context,
    pattern: Pattern,
    guaranteed: bool,
    subject: String,
    /// The name of the stream, if the messages are guaranteed.
    stream: String,
}

impl Client {
    pub(super) async fn connect(part: &Part) -> anyhow::Result<Self> {
        let url: BrokerUrl = part.broker.as_deref().context("NATS has no address")?.parse()?;
        let server: ServerAddr = url.to_string().parse()?;
        let mut options = ConnectOptions::new().request_timeout(Some(PATIENCE));
        if let Some((name, password)) = url.credentials().and_then(Credentials::as_user) {
            options = options.user_and_password(name.into(), password.reveal().into());
        }
        if let Some(ca) = part.ca() {
            options = options.add_root_certificates(ca);
        }
        let client = options.connect(server).await?;
        let name = match part.pattern {
            Pattern::Publish => TOPIC,
            Pattern::Work | Pattern::Request => SERVICE,
        };
        Ok(Self {
            jetstream: jetstream::new(client.clone()),
            client,
            pattern: part.pattern,
            guaranteed: part.guaranteed,
            subject: format!("{}.{name}", part.mesh),
            stream: part.mesh.clone(),
        })
    }

    pub(super) async fn receive(&self, note: Note) -> anyhow::Result<()> {
        if self.guaranteed {
            return self.work(note).await;
        }
        let subject = self.subject.clone();
        let mut messages = match self.pattern {
            Pattern::Publish => self.client.subscribe(subject).await?,
            Pattern::Work | Pattern::Request => {
                self.client.queue_subscribe(subject, GROUP.into()).await?
            }
        };
        // After the flush the server knows the subscription.
        self.client.flush().await?;
        let client = self.client.clone();
        tokio::spawn(async move {
            while let Some(message) = messages.next().await {
                note(&message.payload);
                if let Some(reply) = message.reply {
                    let _lost = client.publish(reply, message.payload).await;
                }
            }
        });
        Ok(())
    }

    /// Receives the messages of a stream, and acknowledges them.
    async fn work(&self, note: Note) -> anyhow::Result<()> {
        let config = stream::Config {
            name: self.stream.clone(),
            subjects: vec![self.subject.clone()],
            retention: stream::RetentionPolicy::WorkQueue,
            storage: stream::StorageType::File,
            ..stream::Config::default()
        };
        let stream = self.jetstream.get_or_create_stream(config).await?;
        let consumer = pull::Config {
            durable_name: Some(GROUP.into()),
            max_ack_pending: -1,
            ..pull::Config::default()
        };
        let consumer = stream.get_or_create_consumer(GROUP, consumer).await?;
        let mut messages = consumer.messages().await?;
        tokio::spawn(async move {
            while let Some(Ok(message)) = messages.next().await {
                note(&message.payload);
                let _lost = message.ack().await;
            }
        });
        Ok(())
    }

    pub(super) async fn publish(&self, body: Vec<u8>) -> bool {
        self.client.publish(self.subject.clone(), body.into()).await.is_ok()
    }

    pub(super) async fn send(&self, body: Vec<u8>) -> anyhow::Result<()> {
        let (subject, body) = (self.subject.clone(), Bytes::from(body));
        if self.guaranteed {
            let stored = self.jetstream.publish(subject, body).await.map_err(|it| anyhow!(it))?;
            stored.await.map_err(|it| anyhow!(it))?;
        } else if self.pattern == Pattern::Request {
            self.client.request(subject, body).await?;
        } else {
            self.client.publish(subject, body).await?;
        }
        Ok(())
    }

    pub(super) async fn close(&self) {
        let flushed = tokio::time::timeout(Duration::from_secs(1), self.client.flush()).await;
        let _too_late = flushed;
        if self.guaranteed {
            let _gone = self.jetstream.delete_stream(&self.stream).await;
        }
    }
}
