//! From a request's bytes to a response's: what is malformed or refused, the cluster's own zone, upstream's names, EDNS, and how
//! much fits.

use std::sync::Arc;
use std::time::Instant;

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, Record, RecordType};
use parking_lot::RwLock;
use tokio_util::sync::CancellationToken;

use crate::forward::Forwarder;
use crate::hosts::Hosts;
use crate::resolve::{Outcome, Zone};
use crate::telemetry::Telemetry;
use crate::world::World;

/// What we accept, and send at most, over UDP where the client takes it; it avoids fragments.
const UDP_PAYLOAD: u16 = 1232;
const MIN_UDP_PAYLOAD: u16 = 512;
/// Aliases that lead to aliases end here.
const MAX_ALIASES: usize = 8;
const HEADER_BYTES: usize = 12;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// What answers: shared by all sockets.
pub(crate) struct Answerer {
    pub zone: Zone,
    pub world: Arc<RwLock<World>>,
    pub forwarder: Forwarder,
    /// Of a file, ahead of everything else.
    pub hosts: RwLock<Hosts>,
    /// Names that stand for others.
    pub rewrites: Vec<(Name, Name)>,
    /// Whether lists begin elsewhere each time.
    pub spread: bool,
    /// Whether each question is logged.
    pub log: bool,
    /// The question by which we find that we forward to ourselves, and how that is told.
    pub own_question: Name,
    pub looped: CancellationToken,
    /// Whether the world is complete; before, its absences mean nothing.
    pub is_ready: Box<dyn Fn() -> bool + Send + Sync>,
    pub telemetry: Telemetry,
}

/// What is known of a request without asking anybody.
pub(crate) enum Step {
    /// No answer at all: not a question.
    Ignore,
    Done(Vec<u8>),
    /// Upstream must be asked.
    Forward(Box<Pending>),
}

/// A question on its way upstream.
pub(crate) struct Pending {
    request: Message,
    question: Query,
    /// What is answered already: aliases of the cluster that lead outside.
    answers: Vec<Record>,
    transport: Transport,
}

// === impl Answerer ===

impl Answerer {
    /// The first step, which never waits.
    pub(crate) fn begin(&self, bytes: &[u8], transport: Transport) -> Step {
        let began = Instant::now();
        let step = self.read(bytes, transport);
        if matches!(step, Step::Done(_)) {
            self.telemetry.took(began.elapsed());
        }
        step
    }

    fn read(&self, bytes: &[u8], transport: Transport) -> Step {
        let request = match Message::from_vec(bytes) {
            Ok(request) => request,
            Err(_) => return malformed(bytes),
        };
        if request.metadata.message_type == MessageType::Response {
            return Step::Ignore;
        }
        let refuse = |code| Step::Done(self.finish(&request, transport, refusal(&request, code)));
        if request.metadata.op_code != OpCode::Query {
            return refuse(ResponseCode::NotImp);
        }
        if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            return refuse(ResponseCode::BADVERS);
        }
        let [query] = request.queries.as_slice() else { return refuse(ResponseCode::FormErr) };
        let kind = query.query_type();
        self.telemetry.request(transport, kind);
        let served = query.query_class() == DNSClass::IN && !matches!(kind, RecordType::AXFR | RecordType::IXFR);
        if !served {
            return refuse(ResponseCode::Refused);
        }
        let in_zone = self.zone.name.zone_of(query.name());
        if in_zone && !(self.is_ready)() {
            return refuse(ResponseCode::ServFail);
        }
        if kind == RecordType::HINFO && *query.name() == self.own_question {
            self.looped.cancel();
            return refuse(ResponseCode::ServFail);
        }
        let mut question = query.clone();
        if let Some(other) = self.rewritten(query.name()) {
            question.set_name(other.clone());
        }
        self.resolve(request, question, transport)
    }

    fn resolve(&self, request: Message, mut question: Query, transport: Transport) -> Step {
        let mut response = refusal(&request, ResponseCode::NoError);
        for _ in 0..MAX_ALIASES {
            let (name, kind) = (question.name(), question.query_type());
            let outcome = self.zone.hosts(&self.hosts.read(), name, kind);
            let outcome = outcome.unwrap_or_else(|| self.zone.resolve(&self.world.read(), name, kind));
            response.metadata.authoritative = true;
            match outcome {
                Outcome::Answer { mut answers, additionals } => {
                    if self.spread {
                        spread(&mut answers);
                    }
                    response.answers.extend(answers);
                    response.additionals = additionals;
                }
                Outcome::NoData => response.authorities = vec![self.zone.soa()],
                Outcome::NoSuchName => {
                    response.metadata.response_code = ResponseCode::NXDomain;
                    response.authorities = vec![self.zone.soa()];
                }
                Outcome::Alias { cname, target } => {
                    response.answers.push(cname);
                    question.set_name(target);
                    continue;
                }
                Outcome::NotOurs => {
                    let answers = response.answers;
                    return Step::Forward(Box::new(Pending { request, question, answers, transport }));
                }
            }
            return Step::Done(self.finish(&request, transport, response));
        }
        let response = refusal(&request, ResponseCode::ServFail);
        Step::Done(self.finish(&request, transport, response))
    }

    /// Ask upstream, and put its answer behind what there is.
    pub(crate) async fn forward(&self, pending: Pending) -> Vec<u8> {
        let Pending { request, question, answers, transport } = pending;
        let dnssec_ok = request.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok);
        let began = Instant::now();
        let upstream = self.forwarder.ask(&question, dnssec_ok).await;
        self.telemetry.took(began.elapsed());
        let mut response = refusal(&request, upstream.metadata.response_code);
        response.metadata.authentic_data = upstream.metadata.authentic_data && answers.is_empty();
        response.answers = answers;
        response.answers.extend(upstream.answers);
        response.authorities = upstream.authorities;
        response.additionals = upstream.additionals;
        self.finish(&request, transport, response)
    }

    /// Too many questions are on their way upstream.
    pub(crate) fn refuse(&self, pending: &Pending) -> Vec<u8> {
        self.telemetry.refused();
        self.finish(&pending.request, pending.transport, refusal(&pending.request, ResponseCode::Refused))
    }

    /// What a name stands for, where it stands for another.
    fn rewritten(&self, name: &Name) -> Option<&Name> {
        self.rewrites.iter().find(|(from, _)| from == name).map(|(_, to)| to)
    }

    /// The bytes, cut to what the client takes.
    fn finish(&self, request: &Message, transport: Transport, mut response: Message) -> Vec<u8> {
        if request.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_PAYLOAD);
            if request.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok) {
                edns.set_dnssec_ok(true);
            }
            edns.set_rcode_high(response.metadata.response_code.high());
            response.set_edns(edns);
        }
        // A client that asked for one name gets no answer to another.
        if let Some(asked) = request.queries.first().map(Query::name)
            && let Some(other) = self.rewritten(asked)
        {
            let renamed = response.answers.iter_mut().filter(|record| record.name == *other);
            renamed.for_each(|record| record.name = asked.clone());
        }
        self.telemetry.response(response.metadata.response_code);
        if self.log {
            let question = request.queries.first().map(ToString::to_string).unwrap_or_default();
            let (code, answers) = (response.metadata.response_code, response.answers.len());
            tracing::info!(question, %code, answers, ?transport, "answered");
        }
        let limit = match transport {
            Transport::Tcp => usize::from(u16::MAX),
            Transport::Udp => {
                let wanted = request.edns.as_ref().map_or(MIN_UDP_PAYLOAD, Edns::max_payload);
                usize::from(wanted.clamp(MIN_UDP_PAYLOAD, UDP_PAYLOAD))
            }
        };
        fit(response, limit).unwrap_or_default()
    }
}

/// Encode within `limit`: first the additional records go, then, with the truncation flag set, as many answers as must.
fn fit(mut response: Message, limit: usize) -> Option<Vec<u8>> {
    let bytes = response.to_vec().ok()?;
    if bytes.len() <= limit {
        return Some(bytes);
    }
    response.additionals.clear();
    let bytes = response.to_vec().ok()?;
    if bytes.len() <= limit {
        return Some(bytes);
    }
    response.metadata.truncation = true;
    response.authorities.clear();
    loop {
        let bytes = response.to_vec().ok()?;
        if bytes.len() <= limit || response.answers.is_empty() {
            return Some(bytes);
        }
        let keep = response.answers.len() * limit / bytes.len();
        response.answers.truncate(keep.min(response.answers.len() - 1));
    }
}

/// An empty response to the request.
fn refusal(request: &Message, code: ResponseCode) -> Message {
    let mut response = Message::new(request.metadata.id, MessageType::Response, request.metadata.op_code);
    response.metadata = Metadata::response_from_request(&request.metadata);
    response.metadata.recursion_available = true;
    response.metadata.response_code = code;
    response.add_queries(request.queries.iter().cloned());
    response
}

/// What cannot be read gets FORMERR, or NOTIMP where it is no question at all, if it has at least an id, and is not an answer
/// itself.
fn malformed(bytes: &[u8]) -> Step {
    const RESPONSE_BIT: u8 = 0x80;
    if bytes.len() < HEADER_BYTES || bytes[2] & RESPONSE_BIT != 0 {
        return Step::Ignore;
    }
    let (id, asked) = (u16::from_be_bytes([bytes[0], bytes[1]]), OpCode::from_u8(bytes[2] >> 3 & 0x0f));
    let code = if asked == OpCode::Query { ResponseCode::FormErr } else { ResponseCode::NotImp };
    match Message::error_msg(id, asked, code).to_vec() {
        Ok(bytes) => Step::Done(bytes),
        Err(_) => Step::Ignore,
    }
}

/// Begin the list elsewhere each time, so that clients that take the first spread over all.
fn spread(answers: &mut [Record]) {
    if answers.len() > 1 {
        let by = rand::random_range(0..answers.len());
        answers.rotate_left(by);
    }
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use apimachinery::meta::NamespacedName;
    use serde_json::json;

    use super::*;
    use crate::resolve::Options;

    fn answerer(endpoints: usize, ready: bool) -> Answerer {
        let mut world = World::default();
        world.set_namespace("ns", true);
        for (name, spec) in [
            ("big", json!({"clusterIP": "None"})),
            ("web", json!({"clusterIP": "10.96.0.5", "ports": [{"port": 80}]})),
            ("alias", json!({"type": "ExternalName", "externalName": "web.ns.svc.cluster.local"})),
            ("loop", json!({"type": "ExternalName", "externalName": "loop.ns.svc.cluster.local"})),
            ("out", json!({"type": "ExternalName", "externalName": "example.com"})),
        ] {
            let service = serde_json::from_value(json!({"spec": spec})).expect("a service");
            world.set_service(NamespacedName::new("ns", name), Some(&service));
        }
        let list: Vec<_> =
            (0..endpoints).map(|n| json!({"addresses": [format!("10.1.{}.{}", n / 256, n % 256)]})).collect();
        let slice = crate::world::tests::slice("s", "big", json!(list));
        world.set_slice(&NamespacedName::new("ns", "s"), None, Some(&slice));
        Answerer {
            zone: Zone::new("cluster.local", 30, Vec::new(), Options::default()).expect("a zone"),
            world: Arc::new(RwLock::new(world)),
            forwarder: Forwarder::new(crate::forward::tests::settings(Vec::new()), Telemetry::default()),
            hosts: RwLock::default(),
            rewrites: Vec::new(),
            spread: true,
            log: false,
            own_question: Name::from_str("1.2.").expect("a name"),
            looped: CancellationToken::new(),
            is_ready: Box::new(move || ready),
            telemetry: Telemetry::default(),
        }
    }

    fn request(name: &str, payload: Option<u16>) -> Message {
        let mut request = Message::new(7, MessageType::Query, OpCode::Query);
        request.add_query(Query::query(Name::from_ascii(name).expect("a name"), RecordType::A));
        if let Some(payload) = payload {
            let mut edns = Edns::new();
            edns.set_max_payload(payload);
            request.set_edns(edns);
        }
        request
    }

    fn answer(answerer: &Answerer, request: &Message, transport: Transport) -> (Message, usize) {
        match answerer.begin(&request.to_vec().expect("bytes"), transport) {
            Step::Done(bytes) => (Message::from_vec(&bytes).expect("a response"), bytes.len()),
            Step::Ignore => panic!("ignored"),
            Step::Forward(_) => panic!("forwarded"),
        }
    }

    #[test]
    fn large_answers_are_cut_to_what_the_client_takes() {
        let big = answerer(200, true);
        for (transport, payload, limit, truncated) in [
            (Transport::Udp, None, 512, true),
            (Transport::Udp, Some(4096), 1232, true),
            (Transport::Udp, Some(100), 512, true),
            (Transport::Tcp, None, 65535, false),
        ] {
            let (response, size) = answer(&big, &request("big.ns.svc.cluster.local.", payload), transport);
            assert!(size <= limit && !response.answers.is_empty(), "{transport:?} {payload:?}: {size}");
            assert_eq!(response.metadata.truncation, truncated);
            assert_eq!(response.edns.is_some(), payload.is_some());
        }
    }

    #[test]
    fn responses_say_who_speaks() {
        let all = answerer(1, true);
        let (response, _) = answer(&all, &request("web.ns.svc.cluster.local.", None), Transport::Udp);
        assert!(response.metadata.authoritative && response.metadata.recursion_available);
        assert_eq!((response.metadata.id, response.answers[0].ttl), (7, 30));
        let (response, _) = answer(&all, &request("none.ns.svc.cluster.local.", None), Transport::Udp);
        assert_eq!(response.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!((response.authorities[0].record_type(), response.authorities[0].ttl), (RecordType::SOA, 5));
        // A client may mix cases, to know an answer to its own question.
        let (response, _) = answer(&all, &request("WeB.nS.svc.CLUSTER.local.", None), Transport::Udp);
        let told = [response.queries[0].name(), &response.answers[0].name].map(Name::to_string);
        assert_eq!(told, ["WeB.nS.svc.CLUSTER.local."; 2]);
    }

    #[test]
    fn aliases_are_followed_but_not_for_ever() {
        let all = answerer(1, true);
        let (response, _) = answer(&all, &request("alias.ns.svc.cluster.local.", None), Transport::Udp);
        let kinds: Vec<RecordType> = response.answers.iter().map(Record::record_type).collect();
        assert_eq!(kinds, [RecordType::CNAME, RecordType::A]);
        let (response, _) = answer(&all, &request("loop.ns.svc.cluster.local.", None), Transport::Udp);
        assert_eq!(response.metadata.response_code, ResponseCode::ServFail);
    }

    #[tokio::test]
    async fn an_alias_that_leads_outside_keeps_its_record() {
        let all = answerer(1, true);
        let bytes = request("out.ns.svc.cluster.local.", None).to_vec().expect("bytes");
        let Step::Forward(pending) = all.begin(&bytes, Transport::Udp) else { panic!("not forwarded") };
        let response = Message::from_vec(&all.forward(*pending).await).expect("a response");
        assert_eq!(response.metadata.response_code, ResponseCode::ServFail);
        assert_eq!(response.answers[0].record_type(), RecordType::CNAME);
        assert_eq!(response.queries[0].name().to_string(), "out.ns.svc.cluster.local.");
    }

    #[test]
    fn hosts_rewrites_and_our_own_question_go_ahead_of_the_cluster() {
        let name = |text: &str| Name::from_str(text).expect("a name");
        let mut all = answerer(1, true);
        *all.hosts.write() = Hosts::parse("192.0.2.7 printer.example web.ns.svc.cluster.local");
        all.rewrites = vec![(name("old.example."), name("printer.example."))];
        for asked in ["printer.example.", "old.example.", "web.ns.svc.cluster.local."] {
            let (response, _) = answer(&all, &request(asked, None), Transport::Udp);
            let answered: Vec<String> = response.answers.iter().map(|r| format!("{} {}", r.name, r.data)).collect();
            assert_eq!(answered, [format!("{asked} 192.0.2.7")]);
        }
        let mut own = request("1.2.", None);
        own.queries[0].set_query_type(RecordType::HINFO);
        answer(&all, &own, Transport::Udp);
        assert!(all.looped.is_cancelled(), "we forward to ourselves");
    }

    #[test]
    fn what_is_no_question_is_refused_or_ignored() {
        let all = answerer(1, true);
        assert!(matches!(all.begin(b"short", Transport::Udp), Step::Ignore));
        let Step::Done(bytes) = all.begin(&[1, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 5], Transport::Udp) else {
            panic!("no answer")
        };
        assert_eq!(Message::from_vec(&bytes).expect("a response").metadata.response_code, ResponseCode::FormErr);
        let mut response = request("a.", None);
        response.metadata.message_type = MessageType::Response;
        assert!(matches!(all.begin(&response.to_vec().expect("bytes"), Transport::Udp), Step::Ignore));
        let own = |change: &dyn Fn(&mut Message)| {
            let mut request = request("web.ns.svc.cluster.local.", Some(1232));
            change(&mut request);
            answer(&all, &request, Transport::Udp).0
        };
        // BADVERS, which has its number from two documents.
        const SIXTEEN: ResponseCode = ResponseCode::BADSIG;
        let cases: [(&dyn Fn(&mut Message), ResponseCode); 8] = [
            (&|request| request.metadata.op_code = OpCode::Status, ResponseCode::NotImp),
            (&|request| request.metadata.op_code = OpCode::Notify, ResponseCode::NotImp),
            (
                &|request| {
                    request.queries[0].set_query_type(RecordType::AXFR);
                },
                ResponseCode::Refused,
            ),
            (
                &|request| {
                    request.queries[0].set_query_type(RecordType::IXFR);
                },
                ResponseCode::Refused,
            ),
            (
                &|request| {
                    request.queries[0].set_query_class(DNSClass::CH);
                },
                ResponseCode::Refused,
            ),
            (&|request| request.queries.push(request.queries[0].clone()), ResponseCode::FormErr),
            (&|request| request.queries.clear(), ResponseCode::FormErr),
            (
                &|request| {
                    request.edns.get_or_insert_default().set_version(1);
                },
                SIXTEEN,
            ),
        ];
        for (index, (change, expected)) in cases.into_iter().enumerate() {
            let response = own(change);
            assert_eq!((response.metadata.response_code, response.answers.len()), (expected, 0), "{index}");
        }
        // An update that is cut short is no question either.
        let Step::Done(bytes) = all.begin(&[1, 2, 5 << 3, 0, 0, 9, 0, 0, 0, 0, 0, 0, 5], Transport::Udp) else {
            panic!("no answer")
        };
        assert_eq!(Message::from_vec(&bytes).expect("a response").metadata.response_code, ResponseCode::NotImp);
        let (early, _) = answer(&answerer(1, false), &request("web.ns.svc.cluster.local.", None), Transport::Udp);
        assert_eq!(early.metadata.response_code, ResponseCode::ServFail);
    }

    proptest::proptest! {
        #[test]
        fn no_packet_breaks_the_server(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let all = answerer(1, true);
            if let Step::Done(response) = all.begin(&bytes, Transport::Udp) {
                proptest::prop_assert!(response.len() <= usize::from(UDP_PAYLOAD));
            }
        }

        #[test]
        fn any_name_of_the_zone_is_answered(labels in "(_?[a-z0-9]{1,8}[.]){0,6}", kind in proptest::prelude::any::<u16>()) {
            let all = answerer(3, true);
            let mut question = request(&format!("{labels}cluster.local."), Some(1232));
            question.queries[0].set_query_type(RecordType::from(kind));
            let bytes = question.to_vec().expect("bytes");
            match all.begin(&bytes, Transport::Udp) {
                Step::Done(response) => {
                    let response = Message::from_vec(&response).expect("a response");
                    proptest::prop_assert_eq!(response.metadata.id, 7);
                }
                Step::Forward(_) => {}
                Step::Ignore => proptest::prop_assert!(false, "ignored"),
            }
        }
    }
}
