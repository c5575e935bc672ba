//! `publish setup`: bucket, access, headers and distribution, brought to what a site needs.
//!
//! Each is looked at first, and changed where it differs: to run it again changes nothing.

use aws_sdk_cloudfront::types::{
    OriginAccessControlConfig, OriginAccessControlOriginTypes, OriginAccessControlSigningBehaviors,
    OriginAccessControlSigningProtocols, ResponseHeadersPolicyType,
};
use aws_sdk_s3::types::{
    BucketLocationConstraint, CreateBucketConfiguration, PublicAccessBlockConfiguration,
};
use publish::s3::S3;
use serde_json::{Value, json};
use step::Failure;
use step::worker::Job;

use crate::cloudfront::{self, Wanted, amend, refused};

/// Our statement in the bucket's policy: those of others stay.
const STATEMENT: &str = "AnnealCloudFront";

pub async fn run(job: &Job, target: &S3) -> anyhow::Result<Value> {
    if target.endpoint.is_some() {
        return Err(Failure::input(
            "setup makes what is AWS's own, and `endpoint` names another store",
        )
        .hint("the site's folder `hosts` has what nginx and Caddy need")
        .into());
    }
    let found = cloudfront::environment(target.region.as_deref()).await;
    let Some(region) = found.region().map(ToString::to_string) else {
        return Err(Failure::input(format!("{}: in which region is it?", target.bucket))
            .hint("set `region = \"…\"` in the recipe, or AWS_REGION")
            .into());
    };
    let config = aws_sdk_s3::config::Builder::from(&found).force_path_style(target.path_style);
    let s3 = aws_sdk_s3::Client::from_conf(config.build());
    let cloudfront = cloudfront::client().await;
    let setup = Setup { job, target, region, s3, cloudfront, done: Vec::new() };
    Ok(setup.all().await?)
}

struct Setup<'a> {
    job: &'a Job,
    target: &'a S3,
    region: String,
    s3: aws_sdk_s3::Client,
    cloudfront: aws_sdk_cloudfront::Client,
    /// What, and what became of it.
    done: Vec<Value>,
}

impl Setup<'_> {
    async fn all(mut self) -> Result<Value, Failure> {
        self.bucket().await?;
        self.no_public_access().await?;
        let access_control = self.access_control().await?;
        let headers_policy = self.headers_policy().await?;
        let S3 { bucket, prefix, .. } = self.target;
        let wanted = Wanted {
            comment: format!("anneal {bucket}/{prefix}"),
            domain: format!("{bucket}.s3.{}.amazonaws.com", self.region),
            path: if prefix.is_empty() { String::new() } else { format!("/{prefix}") },
            access_control,
            headers_policy,
        };
        let (id, arn, domain) = self.distribution(&wanted).await?;
        self.bucket_policy(&arn).await?;
        Ok(json!({
            "done": self.done,
            "distribution": id,
            "url": format!("https://{domain}/"),
            "policies": policies(self.target, &arn),
        }))
    }

    fn tell(&mut self, what: &str, name: &str, how: &str) {
        self.job.note(format!("{what} {name}: {how}"));
        self.done.push(json!({"what": what, "name": name, "how": how}));
    }

    /// A name for what belongs to this target.
    fn name(&self) -> String {
        let S3 { bucket, prefix, .. } = self.target;
        let name = if prefix.is_empty() { bucket.clone() } else { format!("{bucket}-{prefix}") };
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let name: String = name.chars().map(plain).collect();
        // CloudFront takes 64 characters.
        format!("anneal-{}", &name[..name.len().min(57)])
    }

    async fn bucket(&mut self) -> Result<(), Failure> {
        let bucket = &self.target.bucket;
        let there = match self.s3.head_bucket().bucket(bucket).send().await {
            Ok(_) => true,
            Err(error) if error.as_service_error().is_some_and(|e| e.is_not_found()) => false,
            Err(error) => return Err(refused(format!("the bucket {bucket}"), error)),
        };
        if !there {
            let mut create = self.s3.create_bucket().bucket(bucket);
            if self.region != "us-east-1" {
                let place = BucketLocationConstraint::from(self.region.as_str());
                create = create.create_bucket_configuration(
                    CreateBucketConfiguration::builder().location_constraint(place).build(),
                );
            }
            create
                .send()
                .await
                .map_err(|e| refused(format!("cannot make the bucket {bucket}"), e))?;
        }
        self.tell("bucket", bucket, if there { "as it is" } else { "made" });
        Ok(())
    }

    /// Nobody reads the bucket but CloudFront.
    async fn no_public_access(&mut self) -> Result<(), Failure> {
        let bucket = &self.target.bucket;
        let wanted = PublicAccessBlockConfiguration::builder()
            .block_public_acls(true)
            .ignore_public_acls(true)
            .block_public_policy(true)
            .restrict_public_buckets(true)
            .build();
        let there = self.s3.get_public_access_block().bucket(bucket).send().await;
        let same =
            there.is_ok_and(|there| there.public_access_block_configuration() == Some(&wanted));
        if !same {
            let put = self.s3.put_public_access_block().bucket(bucket);
            let put = put.public_access_block_configuration(wanted).send().await;
            put.map_err(|e| refused(format!("cannot close {bucket} to the public"), e))?;
        }
        self.tell("public access", bucket, if same { "as it is" } else { "closed" });
        Ok(())
    }

    async fn access_control(&mut self) -> Result<String, Failure> {
        let name = self.name();
        let mut marker = None;
        loop {
            let page =
                self.cloudfront.list_origin_access_controls().set_marker(marker).send().await;
            let page = page.map_err(|e| refused("cannot list origin access controls".into(), e))?;
            let list = page.origin_access_control_list();
            let found = list.and_then(|list| list.items().iter().find(|item| item.name() == name));
            if let Some(found) = found {
                let id = found.id().to_string();
                self.tell("origin access control", &name, "as it is");
                return Ok(id);
            }
            marker = list.and_then(|list| list.next_marker()).map(str::to_string);
            if marker.as_deref().is_none_or(str::is_empty) {
                break;
            }
        }
        let config = OriginAccessControlConfig::builder()
            .name(&name)
            .signing_protocol(OriginAccessControlSigningProtocols::Sigv4)
            .signing_behavior(OriginAccessControlSigningBehaviors::Always)
            .origin_access_control_origin_type(OriginAccessControlOriginTypes::S3)
            .build()
            .map_err(|e| Failure::bug(format!("an origin access control: {e}")))?;
        let create = self.cloudfront.create_origin_access_control();
        let made = create.origin_access_control_config(config).send().await;
        let made = made.map_err(|e| refused(format!("cannot make {name}"), e))?;
        self.tell("origin access control", &name, "made");
        let id = made.origin_access_control().map(|made| made.id().to_string());
        id.ok_or_else(|| Failure::environment(format!("{name} was made, and has no id")))
    }

    async fn headers_policy(&mut self) -> Result<String, Failure> {
        let name = self.name();
        let wanted = cloudfront::headers_policy(&name);
        let mut marker = None;
        loop {
            let page = self
                .cloudfront
                .list_response_headers_policies()
                .r#type(ResponseHeadersPolicyType::Custom)
                .set_marker(marker)
                .send()
                .await
                .map_err(|e| refused("cannot list response headers policies".into(), e))?;
            let list = page.response_headers_policy_list();
            let policies = list.map(|list| list.items()).unwrap_or_default();
            let policies = policies.iter().filter_map(|item| item.response_headers_policy());
            let mut named =
                policies.filter_map(|p| Some((p.id(), p.response_headers_policy_config()?)));
            if let Some((id, there)) = named.find(|(_, config)| config.name() == name) {
                let id = id.to_string();
                if cloudfront::sends_the_same(there, &wanted) {
                    self.tell("response headers policy", &name, "as it is");
                    return Ok(id);
                }
                let get = self.cloudfront.get_response_headers_policy().id(&id).send().await;
                let etag = get.map_err(|e| refused(format!("cannot read {name}"), e))?;
                self.cloudfront
                    .update_response_headers_policy()
                    .id(&id)
                    .set_if_match(etag.e_tag)
                    .response_headers_policy_config(wanted)
                    .send()
                    .await
                    .map_err(|e| refused(format!("cannot change {name}"), e))?;
                self.tell("response headers policy", &name, "changed");
                return Ok(id);
            }
            marker = list.and_then(|list| list.next_marker()).map(str::to_string);
            if marker.as_deref().is_none_or(str::is_empty) {
                break;
            }
        }
        let create = self.cloudfront.create_response_headers_policy();
        let made = create.response_headers_policy_config(wanted).send().await;
        let made = made.map_err(|e| refused(format!("cannot make {name}"), e))?;
        self.tell("response headers policy", &name, "made");
        let id = made.response_headers_policy().map(|made| made.id().to_string());
        id.ok_or_else(|| Failure::environment(format!("{name} was made, and has no id")))
    }

    /// Id, ARN and domain.
    async fn distribution(&mut self, wanted: &Wanted) -> Result<(String, String, String), Failure> {
        let id = match &self.target.distribution {
            Some(id) => Some(id.clone()),
            None => self.find(&wanted.comment).await?,
        };
        let Some(id) = id else {
            let config = cloudfront::new_distribution(wanted)?;
            let made =
                self.cloudfront.create_distribution().distribution_config(config).send().await;
            let made = made.map_err(|e| refused("cannot make a distribution".into(), e))?;
            let Some(made) = made.distribution() else {
                return Err(Failure::environment("a distribution was made, and has no id"));
            };
            self.tell("distribution", made.id(), "made: it is some minutes until it answers");
            return Ok((made.id().into(), made.arn().into(), made.domain_name().into()));
        };
        let get = self.cloudfront.get_distribution().id(&id).send().await;
        let get = get.map_err(|e| refused(format!("cannot read the distribution {id}"), e))?;
        let etag = get.e_tag().map(str::to_string);
        let Some(there) = get.distribution else {
            return Err(Failure::environment(format!(
                "the distribution {id} says nothing of itself"
            )));
        };
        let (arn, domain) = (there.arn().to_string(), there.domain_name().to_string());
        let Some(mut config) = there.distribution_config else {
            return Err(Failure::environment(format!(
                "the distribution {id} has no configuration"
            )));
        };
        let changed = amend(&mut config, wanted)?;
        if changed.is_empty() {
            self.tell("distribution", &id, "as it is");
        } else {
            let update = self.cloudfront.update_distribution().id(&id).set_if_match(etag);
            update
                .distribution_config(config)
                .send()
                .await
                .map_err(|e| refused(format!("cannot change the distribution {id}"), e))?;
            self.tell("distribution", &id, &format!("changed: {}", changed.join(", ")));
        }
        Ok((id, arn, domain))
    }

    async fn find(&self, comment: &str) -> Result<Option<String>, Failure> {
        let mut marker = None;
        loop {
            let page = self.cloudfront.list_distributions().set_marker(marker).send().await;
            let page = page.map_err(|e| refused("cannot list distributions".into(), e))?;
            let Some(list) = page.distribution_list() else { return Ok(None) };
            if let Some(found) = list.items().iter().find(|item| item.comment() == comment) {
                return Ok(Some(found.id().to_string()));
            }
            marker = list.next_marker().map(str::to_string);
            if marker.as_deref().is_none_or(str::is_empty) {
                return Ok(None);
            }
        }
    }

    async fn bucket_policy(&mut self, arn: &str) -> Result<(), Failure> {
        let S3 { bucket, prefix, .. } = self.target;
        let there = match self.s3.get_bucket_policy().bucket(bucket).send().await {
            Ok(there) => there.policy,
            Err(error) if error.raw_response().is_some_and(|r| r.status().as_u16() == 404) => None,
            Err(error) => return Err(refused(format!("the policy of {bucket}"), error)),
        };
        let mut policy: Value = match &there {
            None => json!({"Version": "2012-10-17", "Statement": []}),
            Some(text) => serde_json::from_str(text).map_err(|e| {
                Failure::environment(format!("the policy of {bucket} is not JSON: {e}"))
            })?,
        };
        let below = if prefix.is_empty() { "*".to_string() } else { format!("{prefix}/*") };
        let ours = json!({
            "Sid": STATEMENT,
            "Effect": "Allow",
            "Principal": {"Service": "cloudfront.amazonaws.com"},
            "Action": "s3:GetObject",
            "Resource": format!("arn:aws:s3:::{bucket}/{below}"),
            "Condition": {"StringEquals": {"AWS:SourceArn": arn}},
        });
        let Some(statements) = policy["Statement"].as_array_mut() else {
            return Err(Failure::environment(format!(
                "the policy of {bucket} has no list of statements"
            )));
        };
        // Another prefix of the same bucket has a statement of its own.
        let same = |s: &Value| s["Sid"] == STATEMENT && s["Resource"] == ours["Resource"];
        if statements.contains(&ours) {
            self.tell("bucket policy", bucket, "as it is");
            return Ok(());
        }
        statements.retain(|statement| !same(statement));
        statements.push(ours);
        let put = self.s3.put_bucket_policy().bucket(bucket).policy(policy.to_string());
        put.send()
            .await
            .map_err(|e| refused(format!("cannot change the policy of {bucket}"), e))?;
        self.tell("bucket policy", bucket, if there.is_some() { "changed" } else { "made" });
        Ok(())
    }
}

/// What whoever publishes must be allowed, and whoever sets up.
fn policies(target: &S3, distribution: &str) -> Value {
    let bucket = format!("arn:aws:s3:::{}", target.bucket);
    let allow = |actions: &[&str], resource: &str| json!({"Effect": "Allow", "Action": actions, "Resource": resource});
    let policy = |statements: Vec<Value>| json!({"Version": "2012-10-17", "Statement": statements});
    json!({
        "publisher": policy(vec![
            // To delete is only to take the probe of conditional writes away again.
            allow(&["s3:PutObject", "s3:GetObject", "s3:AbortMultipartUpload"], &format!("{bucket}/*")),
            allow(&["s3:DeleteObject"], &format!("{bucket}/{}probe/*", below(target))),
            allow(&["s3:ListBucket"], &bucket),
            allow(&["cloudfront:CreateInvalidation"], distribution),
        ]),
        "setup": policy(vec![
            allow(
                &[
                    "s3:CreateBucket", "s3:ListBucket", "s3:GetBucketPolicy", "s3:PutBucketPolicy",
                    "s3:GetBucketPublicAccessBlock", "s3:PutBucketPublicAccessBlock",
                ],
                &bucket,
            ),
            allow(
                &[
                    "cloudfront:ListOriginAccessControls", "cloudfront:CreateOriginAccessControl",
                    "cloudfront:ListResponseHeadersPolicies", "cloudfront:GetResponseHeadersPolicy",
                    "cloudfront:CreateResponseHeadersPolicy", "cloudfront:UpdateResponseHeadersPolicy",
                    "cloudfront:ListDistributions", "cloudfront:GetDistribution",
                    "cloudfront:CreateDistribution", "cloudfront:UpdateDistribution",
                ],
                "*",
            ),
        ]),
    })
}

fn below(target: &S3) -> String {
    if target.prefix.is_empty() { String::new() } else { format!("{}/", target.prefix) }
}
