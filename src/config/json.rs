//! The configuration as JSON: `--config`, `--dump-config`, and the schema in docs/config.schema.json.

use serde::Deserialize;

use super::{ConfigVersion, VmConfig};

impl VmConfig {
    /// Reads a configuration.
    ///
    /// # Errors
    /// The reason for which it is none: another version of the format, an unknown key, an invalid value.
    pub fn from_json(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        /// The version is read first: keys of another version are unknown.
        #[derive(Deserialize)]
        struct Versioned {
            #[serde(default, rename = "version")]
            _version: ConfigVersion,
        }
        let _: Versioned = serde_json::from_slice(bytes)?;
        serde_json::from_slice(bytes)
    }

    /// Returns the configuration as JSON for people, with a newline at the end.
    ///
    /// # Errors
    /// None that is known: every value has a form in JSON.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self).map(|text| text + "\n")
    }

    /// Returns the JSON Schema of the configuration, with a newline at the end.
    ///
    /// # Errors
    /// As [`to_json`](Self::to_json).
    pub fn json_schema_text() -> Result<String, serde_json::Error> {
        let schema = schemars::schema_for!(Self);
        serde_json::to_string_pretty(&schema).map(|text| text + "\n")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn the_schema_in_the_documentation_is_that_of_the_types() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/config.schema.json");
        let schema = VmConfig::json_schema_text().unwrap();
        if std::env::var_os("RVMM_UPDATE_SCHEMA").is_some() {
            fs::write(&file, &schema).unwrap();
        }
        let documented = fs::read_to_string(&file).unwrap_or_default();
        assert!(
            documented == schema,
            "docs/config.schema.json is not that of the types: update it with RVMM_UPDATE_SCHEMA=1 cargo test -p rvmm --lib schema"
        );
    }

    #[test]
    fn an_old_key_of_the_shutdown_timeout_is_taken() {
        let config = VmConfig::from_json(br#"{"grace_s": 7}"#).unwrap();
        assert_eq!(config.shutdown_timeout_s, 7);
        let text = config.to_json().unwrap();
        assert!(text.contains("\"shutdown_timeout_s\": 7") && !text.contains("grace"), "{text}");
    }

    #[test]
    fn every_path_of_a_configuration_may_have_any_bytes() {
        let text = br#"{
            "boot": {
                "kernel": {"hex": "6bff"}, "initrd": {"file": {"hex": "69ff"}}, "dtb": {"hex": "64ff"},
                "dump_dtb": {"hex": "75ff"}, "load": [{"file": {"hex": "6cff"}, "addr": 0}]
            },
            "serial": {"unix": {"hex": "73ff"}},
            "trace": {"file": {"hex": "74ff"}},
            "gdb": {"at": {"unix": {"hex": "67ff"}}}
        }"#;
        let config = VmConfig::from_json(text).unwrap();
        let again = VmConfig::from_json(config.to_json().unwrap().as_bytes()).unwrap();
        assert_eq!(again, config);
        assert_eq!(config.boot.kernel.unwrap().as_bytes(), b"k\xff");
    }
}
