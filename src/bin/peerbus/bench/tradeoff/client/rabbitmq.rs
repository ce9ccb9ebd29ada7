//! The client over `lapin`, used as its own documents do; requests by RabbitMQ's direct reply-to.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::tcp::OwnedTLSConfig;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::uri::AMQPUri;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    DefaultConnectionBuilder, ExchangeKind,
};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::{Note, PATIENCE};
use crate::bench::tradeoff::actor::Part;
use crate::bench::tradeoff::workload::Pattern;

/// The pseudo-queue on which replies arrive (RabbitMQ, "Direct Reply-to").
const REPLIES: &str = "amq.rabbitmq.reply-to";
/// The maximum number of unacknowledged messages of a consumer.
const PREFETCH: u16 = 500;
const PERSISTENT: u8 = 2;

#[derive(Clone)]
pub(in super::super) struct Client {
    connection: Arc<Connection>,
    channel: Channel,
    pattern: Pattern,
    guaranteed: bool,
    /// The name of the exchange or the queue.
    name: ShortString,
    /// The open requests.
    asked: Arc<Asked>,
}

#[derive(Default)]
struct Asked {
    next: AtomicU64,
    waiting: Mutex<HashMap<String, oneshot::Sender<()>>>,
}

impl Client {
    pub(super) async fn connect(part: &Part) -> anyhow::Result<Self> {
        let url = part.broker.as_deref().context("RabbitMQ has no address")?;
        let mut uri: AMQPUri = url.parse().map_err(anyhow::Error::msg)?;
        if uri.vhost.is_empty() {
            uri.vhost = "/".into();
        }
        let cert_chain = part.ca().map(std::fs::read_to_string).transpose()?;
        let connection = DefaultConnectionBuilder::new()?
            .with_uri(uri)
            .with_properties(ConnectionProperties::default())
            .with_tls_config(OwnedTLSConfig { identity: None, cert_chain })
            .connect()
            .await?;
        let channel = connection.create_channel().await?;
        let name: ShortString = part.mesh.as_str().into();
        let none = FieldTable::default;
        match (part.pattern, part.guaranteed) {
            (Pattern::Publish, _) => {
                let options = ExchangeDeclareOptions { auto_delete: true, ..Default::default() };
                channel
                    .exchange_declare(name.clone(), ExchangeKind::Fanout, options, none())
                    .await?;
            }
            (_, true) => {
                let mut quorum = none();
                quorum.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
                let options = QueueDeclareOptions { durable: true, ..Default::default() };
                channel.queue_declare(name.clone(), options, quorum).await?;
                channel.confirm_select(ConfirmSelectOptions::default()).await?;
            }
            (_, false) => {
                let options = QueueDeclareOptions { auto_delete: true, ..Default::default() };
                channel.queue_declare(name.clone(), options, none()).await?;
            }
        }
        let client = Self {
            connection: Arc::new(connection),
            channel,
            pattern: part.pattern,
            guaranteed: part.guaranteed,
            name,
            asked: Arc::default(),
        };
        if part.pattern == Pattern::Request {
            client.take_replies().await?;
        }
        Ok(client)
    }

    async fn take_replies(&self) -> anyhow::Result<()> {
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let mut replies = self
            .channel
            .basic_consume(REPLIES.into(), "".into(), options, FieldTable::default())
            .await?;
        let asked = self.asked.clone();
        tokio::spawn(async move {
            while let Some(Ok(reply)) = replies.next().await {
                if let Some(id) = reply.properties.correlation_id() {
                    let mut waiting = asked.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                    let _gone = waiting.remove(id.as_str()).map(|waiting| waiting.send(()));
                }
            }
        });
        Ok(())
    }

    pub(super) async fn receive(&self, note: Note) -> anyhow::Result<()> {
        let channel = self.connection.create_channel().await?;
        let queue = match self.pattern {
            Pattern::Publish => {
                let options = QueueDeclareOptions { exclusive: true, ..Default::default() };
                let none = FieldTable::default;
                let queue = channel.queue_declare("".into(), options, none()).await?;
                let bind = QueueBindOptions::default();
                let name = queue.name().clone();
                channel
                    .queue_bind(name.clone(), self.name.clone(), "".into(), bind, none())
                    .await?;
                name
            }
            Pattern::Work | Pattern::Request => self.name.clone(),
        };
        if self.guaranteed {
            channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        }
        let options = BasicConsumeOptions { no_ack: !self.guaranteed, ..Default::default() };
        let mut messages =
            channel.basic_consume(queue, "".into(), options, FieldTable::default()).await?;
        let guaranteed = self.guaranteed;
        tokio::spawn(async move {
            while let Some(Ok(message)) = messages.next().await {
                note(&message.data);
                if guaranteed {
                    let _lost = message.acker.ack(BasicAckOptions::default()).await;
                }
                if let (Some(to), Some(id)) =
                    (message.properties.reply_to(), message.properties.correlation_id())
                {
                    let properties = BasicProperties::default().with_correlation_id(id.clone());
                    let options = BasicPublishOptions::default();
                    let _lost = channel
                        .basic_publish("".into(), to.clone(), options, &message.data, properties)
                        .await;
                }
            }
        });
        Ok(())
    }

    pub(super) async fn publish(&self, body: Vec<u8>) -> bool {
        let (exchange, options) = (self.name.clone(), BasicPublishOptions::default());
        let none = BasicProperties::default();
        self.channel.basic_publish(exchange, "".into(), options, &body, none).await.is_ok()
    }

    pub(super) async fn send(&self, body: Vec<u8>) -> anyhow::Result<()> {
        let mut properties = BasicProperties::default();
        if self.guaranteed {
            properties = properties.with_delivery_mode(PERSISTENT);
        }
        let mut reply = None;
        if self.pattern == Pattern::Request {
            let id = self.asked.next.fetch_add(1, Ordering::Relaxed).to_string();
            properties =
                properties.with_reply_to(REPLIES.into()).with_correlation_id(id.as_str().into());
            let (done, replied) = oneshot::channel();
            self.asked.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, done);
            reply = Some(replied);
        }
        let (queue, options) = (self.name.clone(), BasicPublishOptions::default());
        let body = Bytes::from(body);
        let sent = self.channel.basic_publish("".into(), queue, options, &body, properties).await?;
        if self.guaranteed {
            let confirmed = timeout(PATIENCE, sent).await??;
            ensure!(matches!(confirmed, Confirmation::Ack(_)), "the broker refused the message");
        }
        match reply {
            Some(reply) => Ok(timeout(PATIENCE, reply).await??),
            None => Ok(()),
        }
    }

    pub(super) async fn close(self) {
        if self.guaranteed {
            let options = QueueDeleteOptions::default();
            let _gone = self.channel.queue_delete(self.name.clone(), options).await;
        }
        let _gone = self.connection.close(200, "done".into()).await;
    }
}
