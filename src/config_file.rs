//! Flags from a TOML file: `--config FILE`, one table per subcommand, the same names as the flags.
//!
//! The file's entries become arguments in front of those of the command line, except where the command line
//! names the flag itself: flags win.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

/// Why a configuration file was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigFileError {
    #[error("--config {path}: {source}", path = .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("--config {path}: {source}", path = .path.display())]
    Parse { path: PathBuf, source: toml::de::Error },
    #[error("--config {path}: [{table}] {key} must be a string, number, boolean or list of those", path = .path.display())]
    Type { path: PathBuf, table: String, key: String },
    #[error("--config needs a file name after it")]
    NoName,
}

/// `arguments` (the program's name first) with those of the configuration file, if one is named, put in.
pub(crate) fn expand(arguments: Vec<OsString>) -> Result<Vec<OsString>, ConfigFileError> {
    let ours = arguments.iter().position(|arg| arg == "--").unwrap_or(arguments.len());
    let text: Vec<String> = arguments[..ours].iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let Some(path) = config_path(&text)? else { return Ok(arguments) };
    let Some(command) = text.get(1).filter(|arg| !arg.starts_with('-')) else { return Ok(arguments) };

    let read = |source| ConfigFileError::Read { path: path.clone(), source };
    let content = std::fs::read_to_string(&path).map_err(read)?;
    let parse = |source| ConfigFileError::Parse { path: path.clone(), source };
    let tables: Table = content.parse().map_err(parse)?;
    let from_file = match tables.get(command.as_str()) {
        Some(Value::Table(table)) => table_arguments(&path, command, table, &text)?,
        _ => Vec::new(),
    };
    let mut expanded = arguments[..2].to_vec();
    expanded.extend(from_file.into_iter().map(OsString::from));
    expanded.extend_from_slice(&arguments[2..]);
    Ok(expanded)
}

fn config_path(arguments: &[String]) -> Result<Option<PathBuf>, ConfigFileError> {
    for (index, argument) in arguments.iter().enumerate() {
        if argument == "--config" {
            let name = arguments.get(index + 1).ok_or(ConfigFileError::NoName)?;
            return Ok(Some(name.into()));
        }
        if let Some(name) = argument.strip_prefix("--config=") {
            return Ok(Some(name.into()));
        }
    }
    Ok(None)
}

fn table_arguments(
    path: &Path,
    command: &str,
    table: &Table,
    command_line: &[String],
) -> Result<Vec<String>, ConfigFileError> {
    let mut arguments = Vec::new();
    for (key, value) in table {
        let flag = format!("--{key}");
        let with_value = format!("{flag}=");
        if command_line.iter().any(|arg| *arg == flag || arg.starts_with(&with_value)) {
            continue;
        }
        let fault = || ConfigFileError::Type { path: path.into(), table: command.into(), key: key.clone() };
        match value {
            Value::Boolean(true) => arguments.push(flag),
            Value::Boolean(false) => {}
            Value::Array(items) => {
                for item in items {
                    arguments.push(format!("{with_value}{}", scalar(item).ok_or_else(fault)?));
                }
            }
            _ => arguments.push(format!("{with_value}{}", scalar(value).ok_or_else(fault)?)),
        }
    }
    Ok(arguments)
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expand_with(file: &str, arguments: &[&str]) -> Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shadowserve.toml");
        std::fs::write(&path, file).unwrap();
        let path = path.to_str().unwrap();
        let arguments = arguments.iter().map(|arg| OsString::from(arg.replace("FILE", path))).collect();
        let expanded = expand(arguments).map_err(|error| error.to_string())?;
        Ok(expanded.into_iter().map(|arg| arg.into_string().unwrap().replace(path, "FILE")).collect())
    }

    #[test]
    fn the_table_of_the_subcommand_is_used_and_flags_win() {
        let file =
            "[store]\nmtu = 1500\njson = true\nload = [\"a\", \"b\"]\nip = \"10.0.0.1/24\"\n[fetch]\nx = 1\n";
        let arguments = ["shadowserve", "store", "--ip=10.9.9.9/24", "--config", "FILE", "--", "--mtu"];
        let expanded = expand_with(file, &arguments).unwrap();
        let expected = [
            "shadowserve",
            "store",
            "--json",
            "--load=a",
            "--load=b",
            "--mtu=1500",
            "--ip=10.9.9.9/24",
            "--config",
            "FILE",
            "--",
            "--mtu",
        ];
        let sorted = |list: &[String]| {
            let mut list = list.to_vec();
            list.sort();
            list
        };
        assert_eq!(sorted(&expanded), sorted(&expected.map(String::from)));
        assert_eq!(expanded[..2], ["shadowserve", "store"]);
        assert_eq!(expanded[expanded.len() - 2..], ["--", "--mtu"]);
    }

    #[test]
    fn faults_are_named() {
        let arguments = ["shadowserve", "store", "--config=FILE"];
        assert!(expand_with("[store]\nmtu = {}\n", &arguments).unwrap_err().contains("[store] mtu must be"));
        assert!(expand_with("[store\n", &arguments).unwrap_err().contains("--config"));
        let missing = ["shadowserve", "store", "--config", "/nonexistent/file"];
        assert!(expand_with("", &missing).unwrap_err().contains("/nonexistent/file"));
        assert!(expand_with("", &["shadowserve", "store", "--config"]).unwrap_err().contains("file name"));
    }
}
