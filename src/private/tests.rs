use super::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

/// A folder, and a secret in a folder inside.
fn secret() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    create_folder(&dir.path().join("inner"), Others::Excluded).unwrap();
    let path = dir.path().join("inner/secret");
    create_file(&path, "hush").unwrap();
    (dir, path)
}

fn refusal<T: std::fmt::Debug>(result: io::Result<T>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn a_new_file_and_a_new_folder_are_for_this_user_alone() {
    let (dir, path) = secret();
    assert_eq!((mode(&path), mode(&dir.path().join("inner"))), (0o600, 0o700));
    assert_eq!(read(&path, Others::Excluded).unwrap(), "hush");
    assert!(refusal(create_file(&path, "other")).contains("name a new file"));
    assert_eq!(read(&path, Others::Excluded).unwrap(), "hush");
}

#[test]
fn others_may_read_no_secret_and_write_no_file() {
    let (_dir, path) = secret();
    set_mode(&path, 0o644);
    assert!(refusal(read(&path, Others::Excluded)).contains("chmod 600"));
    read(&path, Others::MayRead).unwrap();
    for loose in [0o664, 0o646] {
        set_mode(&path, loose);
        assert!(refusal(read(&path, Others::MayRead)).contains("chmod go-w"));
    }
}

#[test]
fn a_folder_above_that_others_can_write_is_refused_unless_it_is_sticky() {
    let (dir, path) = secret();
    for (loose, refused) in [(0o770, true), (0o707, true), (0o1777, false), (0o755, false)] {
        set_mode(dir.path(), loose);
        let results = [
            read(&path, Others::MayRead).map(drop),
            create_file(&path.with_file_name(format!("new-{loose}")), "x"),
            create_folder(&dir.path().join(format!("inner/{loose}")), Others::Excluded),
            check_folder(&dir.path().join("inner"), Others::Excluded),
        ];
        for result in results {
            match refused {
                true => assert!(refusal(result).contains(&format!("{loose:o}"))),
                false => result.unwrap(),
            }
        }
    }
}

#[test]
fn a_link_is_followed_and_the_folders_behind_it_are_checked() {
    let (dir, path) = secret();
    let far = dir.path().join("far");
    fs::create_dir(&far).unwrap();
    symlink("../inner/./../inner", far.join("folder")).unwrap();
    symlink(far.join("folder/secret"), far.join("link")).unwrap();
    assert_eq!(read(&far.join("link"), Others::Excluded).unwrap(), "hush");
    set_mode(path.parent().unwrap(), 0o777);
    assert!(refusal(read(&far.join("link"), Others::Excluded)).contains("chmod go-w"));
    set_mode(path.parent().unwrap(), 0o700);
    set_mode(&far, 0o777);
    assert!(refusal(read(&far.join("link"), Others::Excluded)).contains("chmod go-w"));

    symlink("loop", dir.path().join("loop")).unwrap();
    read(&dir.path().join("loop"), Others::Excluded).unwrap_err();
    let missing = read(&dir.path().join("nothing/here"), Others::Excluded).unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
}

#[test]
fn a_link_in_a_folder_of_ours_is_never_followed() {
    let (dir, path) = secret();
    let link = dir.path().join("link");
    symlink(&path, &link).unwrap();
    for options in [
        OpenOptions::new().read(true),
        OpenOptions::new().write(true).truncate(true),
        OpenOptions::new().write(true).create(true),
    ] {
        assert!(refusal(open(&link, options)).contains("symbolic link"));
    }
    create(&link).unwrap_err();
    create_anew(&link).unwrap().write_all(b"new").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "hush");
    assert_eq!((fs::read_to_string(&link).unwrap(), mode(&link)), ("new".into(), 0o600));
    assert!(refusal(open(dir.path(), OpenOptions::new().read(true))).contains("regular file"));
}

#[test]
fn what_belongs_to_another_user_is_refused() {
    let (dir, path) = secret();
    if std::os::unix::fs::chown(&path, Some(65534), None).is_err() {
        return println!("SKIPPED: only root can give files away");
    }
    assert!(refusal(read(&path, Others::Excluded)).contains("another user (uid 65534)"));
    std::os::unix::fs::chown(&path, Some(0), None).unwrap();
    let inner = path.parent().unwrap();
    assert!(is_ours(inner));
    std::os::unix::fs::chown(inner, Some(65534), None).unwrap();
    assert!(!is_ours(inner));
    assert!(refusal(read(&path, Others::Excluded)).contains("another user"));
    assert!(refusal(check_folder(inner, Others::Excluded)).contains("chown 0"));
    std::os::unix::fs::chown(inner, Some(0), None).unwrap();
    let link = dir.path().join("link");
    symlink(&path, &link).unwrap();
    read(&link, Others::Excluded).unwrap();
    std::os::unix::fs::lchown(&link, Some(65534), None).unwrap();
    assert!(refusal(read(&link, Others::Excluded)).contains("another user"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_secret_may_come_over_a_pipe() {
    use std::os::fd::AsRawFd;
    let (reader, mut writer) = io::pipe().unwrap();
    writer.write_all(b"hush").unwrap();
    drop(writer);
    let path = format!("/dev/fd/{}", reader.as_raw_fd());
    assert_eq!(read(Path::new(&path), Others::Excluded).unwrap(), "hush");
}

#[test]
fn a_file_without_end_is_not_read_to_its_end() {
    let (_dir, path) = secret();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(MAX_TEXT + 1).unwrap();
    assert!(refusal(read(&path, Others::Excluded)).contains("16 MiB"));
}
