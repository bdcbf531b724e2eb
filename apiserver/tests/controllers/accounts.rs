//! Identities: ServiceAccounts, their tokens and what pods get of them; certificates; reviews of who may what.

use crate::common::{ISSUER, Server, base64, eventually, has_controllers};
use crate::start;
use serde_json::{Value, json};

const V1: &str = "/api/v1/namespaces/t";
const ACCOUNTS: &str = "/api/v1/namespaces/t/serviceaccounts";
const REQUESTS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
const AUTHENTICATION: &str = "/apis/authentication.k8s.io/v1";
const AUTHORIZATION: &str = "/apis/authorization.k8s.io/v1";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_account_lives_and_its_tokens_hold() {
    let Some(server) = start().await else { return };
    let made = json!({"metadata": {"name": "a", "labels": {"l": "static"}}});
    server.post(ACCOUNTS, &made).await.unwrap();
    let patched =
        server.merge(&format!("{ACCOUNTS}/a"), &json!({"automountServiceAccountToken": false})).await.unwrap();
    assert_eq!(patched["automountServiceAccountToken"], false);
    let listed = server.get("/api/v1/serviceaccounts?labelSelector=l%3Dstatic").await.unwrap();
    assert_eq!(listed["items"][0]["automountServiceAccountToken"], false);
    let mut updated = server.get(&format!("{ACCOUNTS}/a")).await.unwrap();
    updated["automountServiceAccountToken"] = json!(true);
    assert_eq!(server.put(&format!("{ACCOUNTS}/a"), &updated).await.unwrap()["automountServiceAccountToken"], true);

    let ask = json!({"spec": {"audiences": [], "expirationSeconds": 600}});
    let granted = server.post(&format!("{ACCOUNTS}/a/token"), &ask).await.unwrap();
    let token = granted["status"]["token"].as_str().unwrap();
    assert_eq!((&granted["spec"]["expirationSeconds"], &granted["spec"]["audiences"]), (&json!(600), &json!([ISSUER])));
    let review = async |token: &str, audiences: Value| {
        let review = json!({"spec": {"token": token, "audiences": audiences}});
        server.post(&format!("{AUTHENTICATION}/tokenreviews"), &review).await.unwrap()["status"].clone()
    };
    let status = review(token, Value::Null).await;
    assert_eq!(
        (&status["authenticated"], &status["user"]["username"]),
        (&json!(true), &json!("system:serviceaccount:t:a"))
    );
    assert_eq!(
        status["user"]["groups"],
        json!(["system:serviceaccounts", "system:serviceaccounts:t", "system:authenticated"])
    );
    assert!(
        status["user"]["extra"]["authentication.kubernetes.io/credential-id"][0].as_str().unwrap().starts_with("JTI=")
    );
    assert!(status.get("error").is_none());
    let other = review(token, json!(["vault"])).await;
    assert_ne!(other["authenticated"], true);
    assert!(other["error"].is_string(), "{other}");

    // A token for someone else, bound to a pod, ends with it.
    let pod = json!({"metadata": {"name": "p"}, "spec": {"serviceAccountName": "a", "containers": [{"name": "c", "image": "x"}]}});
    let pod = server.post(&format!("{V1}/pods"), &pod).await.unwrap();
    let bound = json!({"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": pod["metadata"]["uid"]});
    let ask = json!({"spec": {"audiences": ["vault"], "boundObjectRef": bound}});
    let granted = server.post(&format!("{ACCOUNTS}/a/token"), &ask).await.unwrap();
    let token = granted["status"]["token"].as_str().unwrap();
    let status = review(token, json!(["vault", "x"])).await;
    assert_eq!((&status["authenticated"], &status["audiences"]), (&json!(true), &json!(["vault"])));
    assert_eq!(status["user"]["extra"]["authentication.kubernetes.io/pod-name"], json!(["p"]));
    assert_eq!(server.post(&format!("{ACCOUNTS}/default/token"), &ask).await.unwrap_err().0, 400);
    server.delete(&format!("{V1}/pods/p"), &Value::Null).await.unwrap();
    eventually("the token ends with its pod", async || {
        let status = review(token, json!(["vault"])).await;
        if status["authenticated"] == true { Err(status.to_string()) } else { Ok(()) }
    })
    .await;
    server.delete(&format!("{ACCOUNTS}?labelSelector=l%3Dstatic"), &Value::Null).await.unwrap();
    server.gone(&format!("{ACCOUNTS}/a")).await;

    // An account can check a token by what the issuer publishes.
    let of_issuer = async |path: &str| {
        let account = ("system:serviceaccount:t:default", ["system:serviceaccounts", "system:authenticated"]);
        server.call_as((account.0, &account.1), "GET", path, &Value::Null).await.unwrap()
    };
    let document = of_issuer("/.well-known/openid-configuration").await;
    assert_eq!((&document["issuer"], &document["response_types_supported"]), (&json!(ISSUER), &json!(["id_token"])));
    let keys: jsonwebtoken::jwk::JwkSet = serde_json::from_value(of_issuer("/openid/v1/jwks").await).unwrap();
    let header = jsonwebtoken::decode_header(token).unwrap();
    let key = jsonwebtoken::DecodingKey::from_jwk(keys.find(header.kid.as_deref().unwrap()).unwrap()).unwrap();
    let mut rules = jsonwebtoken::Validation::new(header.alg);
    rules.set_audience(&["vault"]);
    rules.set_issuer(&[document["issuer"].as_str().unwrap()]);
    let claims = jsonwebtoken::decode::<Value>(token, &key, &rules).unwrap().claims;
    assert_eq!(claims["sub"], "system:serviceaccount:t:a");
    assert!(jsonwebtoken::decode::<Value>(&format!("{token}A"), &key, &rules).is_err(), "a signature of another");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_get_a_token_and_the_authority_unless_they_do_not_want_it() {
    let Some(server) = start().await else { return };
    for (of_account, of_pod, mounted) in [
        (None, None, true),
        (Some(true), None, true),
        (Some(false), None, false),
        (None, Some(true), true),
        (Some(true), Some(true), true),
        (Some(false), Some(true), true),
        (None, Some(false), false),
        (Some(true), Some(false), false),
        (Some(false), Some(false), false),
    ] {
        let account = json!({"metadata": {"name": "a"}, "automountServiceAccountToken": of_account});
        server.post(ACCOUNTS, &account).await.unwrap();
        let spec = json!({"serviceAccountName": "a", "automountServiceAccountToken": of_pod, "containers": [{"name": "c", "image": "x"}]});
        let pod = server.post(&format!("{V1}/pods"), &json!({"metadata": {"name": "p"}, "spec": spec})).await.unwrap();
        let mounts = pod["spec"]["containers"][0]["volumeMounts"].as_array().cloned().unwrap_or_default();
        let path = "/var/run/secrets/kubernetes.io/serviceaccount";
        assert_eq!(mounts.iter().any(|mount| mount["mountPath"] == path), mounted, "{of_account:?} {of_pod:?}");
        for path in [format!("{V1}/pods/p"), format!("{ACCOUNTS}/a")] {
            server.delete(&path, &Value::Null).await.unwrap();
        }
    }

    // The cluster's authority is in every namespace, comes again, and comes right.
    let path = format!("{V1}/configmaps/kube-root-ca.crt");
    let authority = async || {
        eventually("the authority", async || {
            let map = server.get(&path).await.map_err(|error| format!("{error:?}"))?;
            let text = map["data"]["ca.crt"].as_str().unwrap_or_default();
            if text.contains("BEGIN CERTIFICATE") { Ok(map["metadata"]["uid"].clone()) } else { Err(map.to_string()) }
        })
        .await
    };
    let first = authority().await;
    server.delete(&path, &Value::Null).await.unwrap();
    assert_ne!(authority().await, first);
    server.merge(&path, &json!({"data": {"ca.crt": "", "other": "x"}})).await.unwrap();
    authority().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_asked_for_approved_and_signed() {
    let Some(server) = start().await else { return };
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "ann");
    let pem = params.serialize_request(&key).unwrap().pem().unwrap();
    let spec = json!({"request": base64(&pem), "signerName": "kubernetes.io/kube-apiserver-client",
        "expirationSeconds": 3600, "usages": ["digital signature", "key encipherment", "client auth"]});
    let request = |name: &str| json!({"metadata": {"name": name, "labels": {"l": "x"}}, "spec": spec});
    let ann = ("ann", &["devs"][..]);
    let made = server.post(REQUESTS, &request("r")).await.unwrap();
    assert_eq!(made["spec"]["username"], "admin");
    server.post(REQUESTS, &request("s")).await.unwrap();
    assert_eq!(server.call_as(ann, "POST", REQUESTS, &request("u")).await.unwrap_err().0, 403);
    assert_eq!(server.names(&format!("{REQUESTS}?labelSelector=l%3Dx")).await, ["r", "s"]);
    let patched =
        server.merge(&format!("{REQUESTS}/r"), &json!({"metadata": {"annotations": {"a": "b"}}})).await.unwrap();
    assert_eq!(patched["metadata"]["annotations"]["a"], "b");
    // Neither the request itself nor its status can be approved.
    let approved =
        json!({"status": {"conditions": [{"type": "Approved", "status": "True", "reason": "E2E", "message": "fine"}]}});
    for part in ["", "/status"] {
        let answer = server.merge(&format!("{REQUESTS}/r{part}"), &approved).await;
        assert!(answer.is_err() || answer.unwrap()["status"].get("conditions").is_none(), "{part}");
    }
    let answer = server.merge(&format!("{REQUESTS}/r/approval"), &approved).await.unwrap();
    assert_eq!(answer["status"]["conditions"][0]["type"], "Approved");
    let certificate = eventually("the certificate", async || {
        let request = server.get(&format!("{REQUESTS}/r")).await.map_err(|error| format!("{error:?}"))?;
        request["status"]["certificate"].as_str().map(ToOwned::to_owned).ok_or(request["status"].to_string())
    })
    .await;
    assert!(!certificate.is_empty());
    let failed = json!({"status": {"conditions": [{"type": "StatusUpdate", "status": "True", "reason": "E2E"}]}});
    let answer = server.merge(&format!("{REQUESTS}/s/status"), &failed).await.unwrap();
    assert_eq!(answer["status"]["conditions"][0]["type"], "StatusUpdate");
    server.delete(&format!("{REQUESTS}/r"), &Value::Null).await.unwrap();
    server.delete(&format!("{REQUESTS}?labelSelector=l%3Dx"), &Value::Null).await.unwrap();
    server.gone(&format!("{REQUESTS}/s")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reviews_say_what_requests_meet() {
    let Some(server) = start().await else { return };
    server.post(ACCOUNTS, &json!({"metadata": {"name": "a"}})).await.unwrap();
    let name = "system:serviceaccount:t:a";
    let groups = ["system:serviceaccounts", "system:serviceaccounts:t", "system:authenticated"];
    let me = (name, &groups[..]);
    let role = json!({"metadata": {"name": "r"}, "rules": [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list"]}]});
    let rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/t";
    for granted in [false, true] {
        if granted {
            server.post(&format!("{rbac}/roles"), &role).await.unwrap();
            let binding = json!({"metadata": {"name": "b"}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"},
                "subjects": [{"kind": "ServiceAccount", "name": "a", "namespace": "t"}]});
            server.post(&format!("{rbac}/rolebindings"), &binding).await.unwrap();
        }
        let attributes = json!({"verb": "list", "resource": "configmaps", "namespace": "t", "version": "v1"});
        let spec = json!({"resourceAttributes": attributes, "user": name, "groups": groups});
        eventually("the reviews agree", async || {
            let met = server.call_as(me, "GET", &format!("{V1}/configmaps"), &Value::Null).await.is_ok();
            let mut said = Vec::new();
            for (path, kind) in [
                (format!("{AUTHORIZATION}/subjectaccessreviews"), "SubjectAccessReview"),
                (format!("{AUTHORIZATION}/namespaces/t/localsubjectaccessreviews"), "LocalSubjectAccessReview"),
            ] {
                let review = server.post(&path, &json!({"kind": kind, "spec": spec})).await.unwrap();
                assert_eq!(review["kind"], kind);
                said.push(review["status"]["allowed"] == true);
            }
            let mine = json!({"spec": {"resourceAttributes": attributes}});
            let mine =
                server.call_as(me, "POST", &format!("{AUTHORIZATION}/selfsubjectaccessreviews"), &mine).await.unwrap();
            said.push(mine["status"]["allowed"] == true);
            let rules = json!({"spec": {"namespace": "t"}});
            let rules =
                server.call_as(me, "POST", &format!("{AUTHORIZATION}/selfsubjectrulesreviews"), &rules).await.unwrap();
            let listed = rules["status"]["resourceRules"]
                .as_array()
                .unwrap()
                .iter()
                .any(|r| r["resources"] == json!(["configmaps"]));
            said.push(listed);
            if met == granted && said.iter().all(|said| *said == granted) {
                Ok(())
            } else {
                Err(format!("{met} {said:?}"))
            }
        })
        .await;
    }
    let who = server.call_as(me, "POST", &format!("{AUTHENTICATION}/selfsubjectreviews"), &json!({})).await.unwrap();
    assert_eq!(who["status"]["userInfo"], json!({"username": name, "groups": groups}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_servers_authority_is_published_where_trust_bundles_are_on() {
    if !has_controllers() {
        return;
    }
    let gates = "--feature-gates=ClusterTrustBundle=true,PodCertificateRequest=true";
    let mut server =
        Server::start_for_controllers_with(&["--runtime-config=certificates.k8s.io/v1beta1=true", gates]).await;
    server.add_controllers(&["--leader-elect=false", "--secure-port=0", gates]);
    let bundles = "/apis/certificates.k8s.io/v1beta1/clustertrustbundles";
    let signer = "kubernetes.io/kube-apiserver-serving";
    let of_signer = format!("{bundles}?fieldSelector=spec.signerName%3D{signer}");
    let only = async || {
        eventually("the one bundle", async || match server.get(&of_signer).await.map(|list| list["items"].clone()) {
            Ok(items) if items.as_array().is_some_and(|items| items.len() == 1) => Ok(items[0].clone()),
            other => Err(format!("{other:?}")),
        })
        .await
    };
    let made = only().await;
    let name = made["metadata"]["name"].as_str().unwrap().to_owned();
    assert!(name.starts_with("kubernetes.io:kube-apiserver-serving:"), "{name}");
    let text = made["spec"]["trustBundle"].clone();
    assert!(text.as_str().is_some_and(|text| text.starts_with("-----BEGIN CERTIFICATE-----")));

    // It comes back, and one of another authority goes.
    server.delete(&format!("{bundles}/{name}"), &Value::Null).await.unwrap();
    let old = json!({"metadata": {"name": "kubernetes.io:kube-apiserver-serving:old"},
        "spec": {"signerName": signer, "trustBundle": text}});
    server.post(bundles, &old).await.unwrap();
    eventually("the bundle is as it was", async || {
        let names = server.names(&of_signer).await;
        if names == [name.clone()] { Ok(()) } else { Err(format!("{names:?}")) }
    })
    .await;
    assert_eq!(only().await["spec"]["trustBundle"], made["spec"]["trustBundle"]);
}
