//! CloudFront: a client, what is let go from its caches, and what a distribution must be like.

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_cloudfront::Client;
use aws_sdk_cloudfront::error::DisplayErrorContext;
use aws_sdk_cloudfront::types::{
    Aliases, AllowedMethods, CachedMethods, DefaultCacheBehavior, DistributionConfig, HttpVersion,
    InvalidationBatch, Method, Origin, Origins, Paths, ResponseHeadersPolicyConfig,
    ResponseHeadersPolicyContentTypeOptions, ResponseHeadersPolicyCustomHeader,
    ResponseHeadersPolicyCustomHeadersConfig, ResponseHeadersPolicySecurityHeadersConfig,
    S3OriginConfig, ViewerProtocolPolicy,
};
use aws_smithy_http_client::{Builder, tls};
use release::{INDEX, headers};
use step::Failure;

/// AWS's own policy `CachingOptimized`: keeps what the origin's headers allow.
const CACHING_OPTIMIZED: &str = "658327ea-f89d-4fab-a63d-7e88639e58f6";
/// The one of our headers that CloudFront has a switch for, and takes no other way.
const NOSNIFF: &str = "X-Content-Type-Options";

/// What the environment says of credentials and region.
pub async fn environment(region: Option<&str>) -> SdkConfig {
    let ring = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring);
    let http = Builder::new().tls_provider(ring).build_https();
    let mut loader = aws_config::defaults(BehaviorVersion::latest()).http_client(http);
    if let Some(region) = region {
        loader = loader.region(Region::new(region.to_string()));
    }
    loader.load().await
}

pub async fn client() -> Client {
    // It has one region for all the world.
    Client::new(&environment(Some("us-east-1")).await)
}

/// A refusal of AWS as a failure.
pub fn refused<E: std::error::Error>(what: String, error: E) -> Failure {
    let text = format!("{}", DisplayErrorContext(&error));
    let failure = Failure::environment(format!("{what}: {text}"));
    if text.contains("AccessDenied") || text.contains("NotAuthorized") {
        return failure
            .hint("these credentials may not: `cargo xtask publish setup` prints the policies that are needed");
    }
    failure
}

/// Has the caches ask again for what changed in place.
pub async fn invalidate(distribution: &str, moved: &[String]) -> Result<(), Failure> {
    let mut paths: Vec<String> = moved.iter().map(|path| format!("/{path}")).collect();
    if moved.iter().any(|path| path == INDEX) {
        paths.push("/".into());
    }
    let wrong = |e| Failure::bug(format!("an invalidation: {e}"));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let count = i32::try_from(paths.len()).unwrap_or(i32::MAX);
    let batch = InvalidationBatch::builder()
        .paths(Paths::builder().quantity(count).set_items(Some(paths)).build().map_err(wrong)?)
        .caller_reference(format!("anneal-{}", now.map_or(0, |time| time.as_nanos())))
        .build()
        .map_err(wrong)?;
    client()
        .await
        .create_invalidation()
        .distribution_id(distribution)
        .invalidation_batch(batch)
        .send()
        .await
        .map_err(|e| refused(format!("the caches of {distribution} keep the old page"), e))?;
    Ok(())
}

/// The policy that isolates every response.
pub fn headers_policy(name: &str) -> ResponseHeadersPolicyConfig {
    let custom =
        headers::ALWAYS.iter().filter(|(name, _)| *name != NOSNIFF).map(|(name, value)| {
            ResponseHeadersPolicyCustomHeader::builder()
                .header(*name)
                .value(*value)
                .r#override(true)
                .build()
                .expect("a header has a name and a value")
        });
    let custom: Vec<_> = custom.collect();
    let nosniff = ResponseHeadersPolicyContentTypeOptions::builder()
        .r#override(true)
        .build()
        .expect("a switch is on or off");
    ResponseHeadersPolicyConfig::builder()
        .name(name)
        .comment("Isolates a page, so that it has shared memory")
        .custom_headers_config(
            ResponseHeadersPolicyCustomHeadersConfig::builder()
                .quantity(i32::try_from(custom.len()).expect("a few headers"))
                .set_items(Some(custom))
                .build()
                .expect("headers are counted"),
        )
        .security_headers_config(
            ResponseHeadersPolicySecurityHeadersConfig::builder()
                .content_type_options(nosniff)
                .build(),
        )
        .build()
        .expect("a policy has a name")
}

/// Whether a policy sends what ours sends.
pub fn sends_the_same(a: &ResponseHeadersPolicyConfig, b: &ResponseHeadersPolicyConfig) -> bool {
    let of = |policy: &ResponseHeadersPolicyConfig| {
        let custom = policy.custom_headers_config().map(|all| all.items().to_vec());
        let mut custom: Vec<(String, String, bool)> = custom
            .unwrap_or_default()
            .into_iter()
            .map(|header| (header.header.to_lowercase(), header.value, header.r#override))
            .collect();
        custom.sort();
        let nosniff = policy.security_headers_config().and_then(|s| s.content_type_options());
        (custom, nosniff.map(|options| options.r#override))
    };
    of(a) == of(b)
}

/// Where a distribution has its objects from, and what it adds to them.
pub struct Wanted {
    pub comment: String,
    /// `my-site.s3.eu-central-1.amazonaws.com`
    pub domain: String,
    /// The folder in the bucket, `/` in front; or nothing.
    pub path: String,
    pub access_control: String,
    pub headers_policy: String,
}

const ORIGIN: &str = "anneal";

/// A distribution from nothing.
pub fn new_distribution(wanted: &Wanted) -> Result<DistributionConfig, Failure> {
    let wrong = |e| Failure::bug(format!("a distribution: {e}"));
    let behaviour = DefaultCacheBehavior::builder()
        .target_origin_id(ORIGIN)
        .viewer_protocol_policy(ViewerProtocolPolicy::RedirectToHttps)
        .allowed_methods(methods()?)
        .compress(true)
        .cache_policy_id(CACHING_OPTIMIZED)
        .response_headers_policy_id(&wanted.headers_policy)
        .build()
        .map_err(wrong)?;
    DistributionConfig::builder()
        .caller_reference(&wanted.comment)
        .comment(&wanted.comment)
        .aliases(Aliases::builder().quantity(0).build().map_err(wrong)?)
        .default_root_object(INDEX)
        .origins(Origins::builder().quantity(1).items(origin(wanted)?).build().map_err(wrong)?)
        .default_cache_behavior(behaviour)
        .http_version(HttpVersion::Http2and3)
        .is_ipv6_enabled(true)
        .enabled(true)
        .build()
        .map_err(wrong)
}

fn methods() -> Result<AllowedMethods, Failure> {
    let wrong = |e| Failure::bug(format!("methods: {e}"));
    let cached = CachedMethods::builder().quantity(2).items(Method::Get).items(Method::Head);
    AllowedMethods::builder()
        .quantity(2)
        .items(Method::Get)
        .items(Method::Head)
        .cached_methods(cached.build().map_err(wrong)?)
        .build()
        .map_err(wrong)
}

fn origin(wanted: &Wanted) -> Result<Origin, Failure> {
    Origin::builder()
        .id(ORIGIN)
        .domain_name(&wanted.domain)
        .origin_path(&wanted.path)
        .origin_access_control_id(&wanted.access_control)
        // Empty: the access control takes its place.
        .s3_origin_config(S3OriginConfig::builder().origin_access_identity("").build())
        .build()
        .map_err(|e| Failure::bug(format!("an origin: {e}")))
}

/// Brings a distribution to what is wanted, and leaves alone all else of it. Returns what it changed.
pub fn amend(config: &mut DistributionConfig, wanted: &Wanted) -> Result<Vec<String>, Failure> {
    let mut changed = Vec::new();
    let mut set = |what: &str, field: &mut Option<String>, value: &str| {
        if field.as_deref().unwrap_or_default() != value {
            *field = Some(value.to_string());
            changed.push(what.to_string());
        }
    };
    set("default root object", &mut config.default_root_object, INDEX);
    let policy = &wanted.headers_policy;
    if let Some(behaviour) = &mut config.default_cache_behavior {
        set("headers of all paths", &mut behaviour.response_headers_policy_id, policy);
    }
    // A worker's script is isolated too, whichever behaviour serves it.
    for behaviour in
        config.cache_behaviors.iter_mut().flat_map(|all| all.items.iter_mut().flatten())
    {
        let what = format!("headers of {}", behaviour.path_pattern);
        set(&what, &mut behaviour.response_headers_policy_id, policy);
    }
    let served = config.default_cache_behavior.as_ref().map(|b| b.target_origin_id.clone());
    let origins = config.origins.as_mut().map(|origins| &mut origins.items);
    let origin = origins.and_then(|all| all.iter_mut().find(|o| Some(&o.id) == served.as_ref()));
    let Some(origin) = origin else {
        return Err(Failure::input("the distribution's default behaviour has no origin")
            .hint("leave `distribution` away, and a new one is made"));
    };
    if origin.domain_name != wanted.domain {
        return Err(Failure::input(format!(
            "the distribution serves {}, not {}: another site would be lost",
            origin.domain_name, wanted.domain
        ))
        .hint("name another `distribution`, or leave it away and a new one is made"));
    }
    set("origin path", &mut origin.origin_path, &wanted.path);
    set("origin access control", &mut origin.origin_access_control_id, &wanted.access_control);
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use aws_sdk_cloudfront::types::{CacheBehavior, CacheBehaviors};

    use super::*;

    fn wanted() -> Wanted {
        Wanted {
            comment: "anneal my-site/".into(),
            domain: "my-site.s3.eu-central-1.amazonaws.com".into(),
            path: String::new(),
            access_control: "E1".into(),
            headers_policy: "policy-1".into(),
        }
    }

    #[test]
    fn every_behaviour_sends_the_headers() {
        let mut config = new_distribution(&wanted()).unwrap();
        assert_eq!(amend(&mut config, &wanted()).unwrap(), [""; 0], "made as it should be");
        let api = CacheBehavior::builder()
            .path_pattern("/assets/*")
            .target_origin_id(ORIGIN)
            .viewer_protocol_policy(ViewerProtocolPolicy::HttpsOnly)
            .build()
            .unwrap();
        config.cache_behaviors =
            Some(CacheBehaviors::builder().quantity(1).items(api).build().unwrap());
        config.default_cache_behavior.as_mut().unwrap().response_headers_policy_id = None;
        let changed = amend(&mut config, &wanted()).unwrap();
        assert_eq!(changed, ["headers of all paths", "headers of /assets/*"]);
        let behaviours = config.cache_behaviors().unwrap().items();
        assert_eq!(behaviours[0].response_headers_policy_id(), Some("policy-1"));
        // What we did not ask for stays.
        assert_eq!(behaviours[0].viewer_protocol_policy(), &ViewerProtocolPolicy::HttpsOnly);
    }

    #[test]
    fn the_distribution_of_another_site_is_left_alone() {
        let mut config = new_distribution(&wanted()).unwrap();
        let other = Wanted { domain: "other.s3.amazonaws.com".into(), ..wanted() };
        let refused = amend(&mut config, &other).unwrap_err();
        assert!(refused.message.contains("another site would be lost"), "{refused}");
    }

    #[test]
    fn the_policy_is_the_table_of_headers() {
        let policy = headers_policy("anneal-my-site");
        let custom = policy.custom_headers_config().unwrap().items();
        let ours = headers::ALWAYS.iter().filter(|(name, _)| *name != NOSNIFF);
        let ours: Vec<_> = ours.map(|(name, value)| (*name, *value, true)).collect();
        let custom: Vec<_> =
            custom.iter().map(|h| (h.header(), h.value(), h.r#override())).collect();
        assert_eq!(custom, ours);
        let mut other = policy.clone();
        assert!(sends_the_same(&policy, &other));
        other.security_headers_config = None;
        assert!(!sends_the_same(&policy, &other));
    }
}
