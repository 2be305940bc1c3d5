//! The web page, as far as a browser is not needed (`tests/web_page.py` has one).

use reqwest::Method;

use crate::support::TestServer;

#[tokio::test]
async fn the_page_is_there_without_a_key_and_asks_nobody_else() {
    let server = TestServer::with(|settings, _| settings.api_key = Some(vec!["secret".into()])).await;
    let page = server.send(Method::GET, "/", "").await;
    assert_eq!(page.status().as_u16(), 200);
    let policy = page.headers()["content-security-policy"].to_str().unwrap();
    assert!(
        policy.starts_with("default-src 'none'") && !policy.contains("unsafe") && !policy.contains("http")
    );
    assert_eq!(page.headers()["content-type"], "text/html; charset=utf-8");
    let tag = page.headers()["etag"].to_str().unwrap().to_owned();
    assert!(page.text().await.unwrap().contains("page/main.js"));
    let script = server.send(Method::GET, "/page/main.js", "").await;
    assert_eq!(script.headers()["content-type"], "text/javascript; charset=utf-8");
    assert_ne!(script.headers()["etag"], tag.as_str());
    assert_eq!(server.send(Method::GET, "/page/none.js", "").await.status().as_u16(), 404);
    assert_eq!(server.send(Method::POST, "/", "").await.status().as_u16(), 405);
}

#[tokio::test]
async fn the_page_can_be_turned_off() {
    let server = TestServer::with(|settings, _| settings.disable_web_page = Some(true)).await;
    for path in ["/", "/page/main.js"] {
        assert_eq!(server.send(Method::GET, path, "").await.status().as_u16(), 404, "{path}");
    }
}
