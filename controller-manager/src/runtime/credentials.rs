//! Whose name a controller writes in.
//!
//! With `--use-service-account-credentials` each controller writes as `kube-system/<controller>`, whose rights are the
//! default role `system:controller:<controller>`; otherwise as the process itself. All share a connection: what tells
//! them apart is the bearer token that [`Delegate`] puts on a request. Tokens are renewed before they expire, and at once
//! when the server does not accept one any more (its ServiceAccount was deleted and made anew, say).
use super::worker::{cause, is_code};
use component_base::{backoff::Backoff, client::Service, transport::Received};
use futures::future::BoxFuture;
use http::{HeaderValue, Request, Response, StatusCode, header::AUTHORIZATION};
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::{Api, Client, api::PostParams, client::Body};
use parking_lot::{Mutex, RwLock};
use std::{
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tower::BoxError;
use tracing::{debug, warn};

const NAMESPACE: &str = "kube-system";
const TOKEN_LIFETIME_SECONDS: i64 = 3600;
/// Part of its life after which a token is renewed.
const RENEW_AT: f64 = 0.8;
const RETRY_BASE: Duration = Duration::from_millis(200);
const RETRY_CAP: Duration = Duration::from_secs(30);

/// Makes the clients of controllers.
pub struct Credentials {
    /// The process's own client: it may make ServiceAccounts and ask for their tokens.
    own: Client,
    /// What controllers write through, and whether that says who they are: else they do, by tokens.
    base: Service,
    tokens: bool,
    limits: Limits,
    shutdown: CancellationToken,
}

/// `--kube-api-qps` and `--kube-api-burst`, for each controller.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Zero or less is no limit.
    pub qps: f64,
    pub burst: f64,
}

// === impl Credentials ===

impl Credentials {
    pub fn new(own: Client, base: Service, tokens: bool, limits: Limits, shutdown: CancellationToken) -> Self {
        Self { own, base, tokens, limits, shutdown }
    }

    /// A client that writes as `kube-system/<account>`, with so many times the limits; returns once it has its first token.
    /// None on shutdown.
    pub async fn client(&self, account: &str, times: f64) -> Option<Client> {
        let Limits { qps, burst } = self.limits;
        let limiter = Arc::new(Limiter::new(Limits { qps: qps * times, burst: burst * times }));
        let client = |token| {
            let delegate = Delegate { base: self.base.clone(), limiter, token };
            Client::new(delegate, self.own.default_namespace())
        };
        if !self.tokens {
            return Some(client(None));
        }
        let token = Arc::new(Token { header: RwLock::new(None), renew: Notify::new() });
        let expires = tokio::select! {
            expires = renew(&self.own, account, &token) => expires,
            () = self.shutdown.cancelled() => return None,
        };
        tokio::spawn(keep(self.own.clone(), account.to_owned(), token.clone(), expires, self.shutdown.clone()));
        Some(client(Some(token)))
    }
}

struct Token {
    header: RwLock<Option<HeaderValue>>,
    renew: Notify,
}

async fn keep(own: Client, account: String, token: Arc<Token>, mut lifetime: Duration, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(lifetime.mul_f64(RENEW_AT)) => {}
            // The server refused it. Not more often than this, whatever the cause.
            () = token.renew.notified() => tokio::time::sleep(RETRY_BASE).await,
            () = shutdown.cancelled() => return,
        }
        lifetime = tokio::select! {
            lifetime = renew(&own, &account, &token) => lifetime,
            () = shutdown.cancelled() => return,
        };
    }
}

/// Tries until it has a token; gives how long it holds.
async fn renew(own: &Client, account: &str, token: &Token) -> Duration {
    let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
    loop {
        match request(own, account).await {
            Ok((header, lifetime)) => {
                *token.header.write() = Some(header);
                return lifetime;
            }
            Err(error) if backoff.failures() < 5 => debug!(account, %error, "no token yet"),
            Err(error) => warn!(account, %error, "no token for the controller's ServiceAccount"),
        }
        tokio::time::sleep(backoff.next_wait()).await;
    }
}

async fn request(own: &Client, account: &str) -> Result<(HeaderValue, Duration), BoxError> {
    let api: Api<ServiceAccount> = Api::namespaced(own.clone(), NAMESPACE);
    let asked = TokenRequest {
        spec: Some(TokenRequestSpec { expiration_seconds: Some(TOKEN_LIFETIME_SECONDS), ..Default::default() }),
        ..Default::default()
    };
    let answer = match api.create_token_request(account, &PostParams::default(), &asked).await {
        Err(error) if is_code(&error, 404) => {
            let mut wanted = ServiceAccount::default();
            wanted.metadata.name = Some(account.to_owned());
            match api.create(&PostParams::default(), &wanted).await {
                Ok(_) => {}
                Err(error) if is_code(&error, 409) => {}
                Err(error) => return Err(cause(&error).into()),
            }
            api.create_token_request(account, &PostParams::default(), &asked).await
        }
        answer => answer,
    };
    let answer = answer.map_err(|e| cause(&e))?;
    let granted = answer.status.unwrap_or_default();
    let token = granted.token.ok_or("the server's answer holds no token")?;
    let expires = granted.expiration_timestamp.ok_or("the server's answer does not say how long the token holds")?;
    let mut header = HeaderValue::try_from(format!("Bearer {token}"))?;
    header.set_sensitive(true);
    let lifetime = expires.0.duration_since(k8s_openapi::jiff::Timestamp::now());
    // A clock that is off must not make this spin.
    Ok((header, Duration::try_from(lifetime).unwrap_or_default().max(Duration::from_secs(60))))
}

// === the service below a controller's client ===

#[derive(Clone)]
struct Delegate {
    base: Service,
    limiter: Arc<Limiter>,
    token: Option<Arc<Token>>,
}

impl tower::Service<Request<Body>> for Delegate {
    type Response = Response<Received>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let Self { mut base, limiter, token } = self.clone();
        Box::pin(async move {
            limiter.take().await;
            if let Some(header) = token.as_ref().and_then(|t| t.header.read().clone()) {
                request.headers_mut().insert(AUTHORIZATION, header);
            }
            let response = base.call(request).await?;
            if response.status() == StatusCode::UNAUTHORIZED
                && let Some(token) = token
            {
                token.renew.notify_one();
            }
            Ok(response)
        })
    }
}

/// A token bucket: so many requests a second, and a burst of them at once.
struct Limiter {
    limits: Limits,
    /// How many there were at the time.
    level: Mutex<(f64, Instant)>,
}

impl Limiter {
    fn new(limits: Limits) -> Self {
        Self { limits, level: Mutex::new((limits.burst.max(1.0), Instant::now())) }
    }

    async fn take(&self) {
        if self.limits.qps <= 0.0 {
            return;
        }
        let wait = self.reserve(Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Takes one that is there, or one to come; gives how long until then.
    fn reserve(&self, now: Instant) -> Duration {
        let mut state = self.level.lock();
        let (level, then) = *state;
        let refilled = level + now.saturating_duration_since(then).as_secs_f64() * self.limits.qps;
        let left = refilled.min(self.limits.burst.max(1.0)) - 1.0;
        *state = (left, now);
        if left >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-left / self.limits.qps) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let limiter = Limiter::new(Limits { qps: 10.0, burst: 3.0 });
        let start = Instant::now();
        let waits: Vec<u128> = (0..5).map(|_| limiter.reserve(start).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100, 200]);
        assert_eq!(limiter.reserve(start + Duration::from_secs(10)), Duration::ZERO);
    }
}
