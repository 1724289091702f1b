// A client with Netty and its standard compression handler: `java -cp netty-all.jar NettyClient.java URL`. It sends
// "Hello" twice and 70,000 times "x", all compressed, and prints the length of each message that it gets, then the Close.

import io.netty.bootstrap.Bootstrap;
import io.netty.channel.*;
import io.netty.channel.nio.NioEventLoopGroup;
import io.netty.channel.socket.SocketChannel;
import io.netty.channel.socket.nio.NioSocketChannel;
import io.netty.handler.codec.http.*;
import io.netty.handler.codec.http.websocketx.*;
import io.netty.handler.codec.http.websocketx.extensions.compression.WebSocketClientCompressionHandler;
import java.net.URI;

public class NettyClient {
    static final String[] MESSAGES = {"Hello", "Hello", "x".repeat(70_000)};

    static class Talk extends SimpleChannelInboundHandler<Object> {
        int heard = 0;

        @Override
        public void userEventTriggered(ChannelHandlerContext context, Object event) {
            if (event == WebSocketClientProtocolHandler.ClientHandshakeStateEvent.HANDSHAKE_COMPLETE) say(context);
        }

        void say(ChannelHandlerContext context) {
            if (heard < MESSAGES.length) context.writeAndFlush(new TextWebSocketFrame(MESSAGES[heard]));
            else context.writeAndFlush(new CloseWebSocketFrame(1000, "done"));
        }

        @Override
        protected void channelRead0(ChannelHandlerContext context, Object message) {
            if (message instanceof TextWebSocketFrame) {
                System.out.println(((TextWebSocketFrame) message).text().length());
                heard++;
                say(context);
            } else if (message instanceof CloseWebSocketFrame) {
                System.out.println(((CloseWebSocketFrame) message).statusCode());
            }
        }

        @Override
        public void exceptionCaught(ChannelHandlerContext context, Throwable error) {
            System.out.println(error);
            context.close();
        }
    }

    public static void main(String[] arguments) throws Exception {
        URI url = new URI(arguments[0]);
        NioEventLoopGroup group = new NioEventLoopGroup(1);
        Bootstrap bootstrap = new Bootstrap().group(group).channel(NioSocketChannel.class);
        bootstrap.handler(new ChannelInitializer<SocketChannel>() {
            @Override
            protected void initChannel(SocketChannel channel) {
                WebSocketClientHandshaker handshaker = WebSocketClientHandshakerFactory.newHandshaker(
                    url, WebSocketVersion.V13, null, true, new DefaultHttpHeaders(), 1 << 20);
                channel.pipeline().addLast(new HttpClientCodec(), new HttpObjectAggregator(8192),
                    WebSocketClientCompressionHandler.INSTANCE,
                    new WebSocketClientProtocolHandler(handshaker, false), new Talk());
            }
        });
        bootstrap.connect(url.getHost(), url.getPort()).sync().channel().closeFuture().sync();
        group.shutdownGracefully(0, 1, java.util.concurrent.TimeUnit.SECONDS);
    }
}
