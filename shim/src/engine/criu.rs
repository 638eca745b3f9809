//! criu, as the native engine uses it: which program, with what, for how long. OCI runtimes look for it themselves.
use std::path::Path;

use x_engine::plan::{CgroupMode, Criu};

use super::{EngineError, Verb, choice, refused};
use crate::options::{CriuOptions, RuntimeOptions};

/// The folders of a request, and its options.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CriuRequest<'a> {
    pub(crate) image_path: &'a Path,
    pub(crate) work_path: &'a Path,
    pub(crate) options: &'a CriuOptions,
}

/// Finds criu, and checks the options.
///
/// Errors: it is not there, with where it was looked for; an option that it does not implement.
pub(crate) fn blocking_plan_criu(verb: Verb, container: &RuntimeOptions, request: CriuRequest<'_>) -> Result<Criu, EngineError> {
    plan(verb, container, request, std::env::var("PATH").ok().filter(|path| !path.is_empty()))
}

fn plan(verb: Verb, container: &RuntimeOptions, request: CriuRequest<'_>, path: Option<String>) -> Result<Criu, EngineError> {
    let unsupported = |message: String| EngineError::Unsupported { verb, message };
    let path = path.unwrap_or_else(|| super::command::DEFAULT_PATH.to_owned());
    let program = match &container.criu_path {
        Some(program) if choice::is_executable(program) => program.clone(),
        Some(program) => {
            return Err(unsupported(format!("criu: {}, named by the option CriuPath, is not an executable file", program.display())));
        }
        None => choice::find("criu", &path)
            .ok_or_else(|| unsupported(format!("criu, which saves and restores processes, is not in PATH={path}: install it")))?,
    };
    let CriuOptions { open_tcp, external_unix_sockets, terminal, file_locks, empty_namespaces, cgroups_mode } = request.options;
    // The network of a container is made anew in any case.
    if let Some(name) = empty_namespaces.iter().find(|name| *name != "network") {
        return Err(unsupported(format!("the option EmptyNamespaces with {name:?}: criu implements network alone")));
    }
    let text =
        |path: &Path| path.to_str().map(str::to_owned).ok_or_else(|| unsupported(format!("{}: a path that is not text", path.display())));
    Ok(Criu {
        program: text(&program)?,
        search_path: path,
        image: text(request.image_path)?,
        work: text(request.work_path)?,
        open_tcp: *open_tcp,
        external_unix_sockets: *external_unix_sockets,
        shell_job: *terminal,
        file_locks: *file_locks,
        cgroups: CgroupMode::parse(cgroups_mode.as_deref().unwrap_or_default()).map_err(|why| refused(verb, &why))?,
        within_seconds: WITHIN_SECONDS,
    })
}

/// How long criu may take: memory of many GiB on a slow disk.
const WITHIN_SECONDS: u32 = 30 * 60;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn criu_is_the_named_one_or_that_in_path_and_an_error_says_where_it_is_not() {
        let folder = scratch::Folder::new("criu");
        let program = folder.join("criu");
        let options = CriuOptions::default();
        let request = CriuRequest { image_path: Path::new("/image"), work_path: Path::new("/work"), options: &options };
        let path = format!("/no/such:{}", folder.display());
        let in_path = || plan(Verb::Checkpoint, &RuntimeOptions::default(), request, Some(path.clone()));
        let error = in_path().expect_err("none").to_string();
        assert!(error.contains("criu") && error.contains(&format!("PATH={path}")), "{error}");
        std::fs::write(&program, "").expect("a file");
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("its mode");
        assert_eq!(in_path().expect("one").program, program.display().to_string());
        let named = |program: PathBuf| {
            let container = RuntimeOptions { criu_path: Some(program), ..RuntimeOptions::default() };
            plan(Verb::Checkpoint, &container, request, Some("/no/such".to_owned()))
        };
        assert_eq!(named(program.clone()).expect("one").program, program.display().to_string());
        let error = named("/no/such/criu".into()).expect_err("none").to_string();
        assert!(error.contains("/no/such/criu, named by the option CriuPath, is not an executable file"), "{error}");
    }

    #[test]
    fn options_that_are_not_implemented_are_refused_by_their_names() {
        let plan = |options: &CriuOptions| {
            let request = CriuRequest { image_path: Path::new("/image"), work_path: Path::new("/work"), options };
            let container = RuntimeOptions { criu_path: Some("/bin/sh".into()), ..RuntimeOptions::default() };
            plan(Verb::Restore, &container, request, None)
        };
        let namespaces = |names: &[&str]| CriuOptions {
            empty_namespaces: names.iter().map(|&name| name.to_owned()).collect(),
            ..CriuOptions::default()
        };
        assert!(plan(&namespaces(&["network"])).is_ok());
        assert!(plan(&namespaces(&["network", "ipc"])).expect_err("refused").to_string().contains("EmptyNamespaces with \"ipc\""));
        let mode = |word: &str| CriuOptions { cgroups_mode: Some(word.to_owned()), ..CriuOptions::default() };
        assert_eq!(plan(&mode("strict")).expect("planned").cgroups, CgroupMode::Strict);
        assert!(plan(&mode("hard")).expect_err("refused").to_string().contains("\"hard\" is unknown"));
    }
}
